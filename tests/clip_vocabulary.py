"""CLIP's own tokenizer, and a pipeline that reads with it: random weights behind the true vocabulary.

The vocabulary follows from the merges that OpenAI published with CLIP. Of the package `refiners`, which carries them,
nothing but this file is read.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sepme_diffusers import SepMEPipeline
from sepme_diffusers.making.kinds import find_kind, kind_names
from sepme_diffusers.text.lexicon import Lexicon
from small import WIDTH, random_unet

_FILE = "foundationals/clip/bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
SIZE, LENGTH = 49_408, 77
# What is left for merges beside each byte, within a word and at its end, and the two special tokens.
_MERGES = SIZE - 2 * 256 - 2


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Return {token: id}, and the merges in their order."""
    package = find_spec("refiners")
    assert package is not None, 'refiners brings the vocabulary: pip install -c constraints.txt -e ".[test]"'
    file = Path(next(iter(package.submodule_search_locations))) / _FILE
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 1 + _MERGES]]  # behind a line that says the version
    symbols = _symbols_of_bytes()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def _symbols_of_bytes() -> list[str]:
    """Return the sign for each byte, in CLIP's order: first those that can be printed and stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + index) for index in range(256 - len(printable)))]


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer: 49,408 tokens, 77 to a prompt."""
    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


@torch.no_grad()
def clip_pipeline(synonyms: Iterable[Iterable[str]] = ()) -> SepMEPipeline:
    """A Stable Diffusion without denoiser and VAE, whose text encoder is untrained and reads with CLIP's tokenizer.

    Its one layer carries each name to all tokens behind it. Its MLP, which would stir them, is weak.

    Args:
        synonyms: Groups of names that it reads alike, as a trained text encoder does; see `read_alike`.
    """
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=SIZE, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=LENGTH, bos_token_id=SIZE - 2, eos_token_id=SIZE - 1,
            pad_token_id=SIZE - 1,
        )
    ).eval()  # fmt: skip
    for name, parameter in text.named_parameters():
        if ".mlp." in name:
            parameter.mul_(0.1)
    pipe = SepMEPipeline(
        vae=None, text_encoder=text, tokenizer=clip_tokenizer(), unet=None, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for names in synonyms:
        read_alike(pipe, names)
    return pipe


def with_denoiser(pipe: SepMEPipeline) -> SepMEPipeline:
    """The same text encoder with an untrained UNet."""
    return SepMEPipeline(**{**pipe.components, "unet": random_unet()}, requires_safety_checker=False)


@torch.no_grad()
def read_alike(pipe: SepMEPipeline, names: Iterable[str], share: float = 0.8) -> None:
    """Give the tokens of names that no other text has a part in common: `share` of their length."""
    ids = {text: set(pipe.tokenizer(text).input_ids) for text in (*names, *_other_texts())}
    own = sorted(set().union(*(ids[name] for name in names)) - set().union(*(ids[text] for text in _other_texts())))
    embeddings = pipe.text_encoder.get_input_embeddings().weight
    common = embeddings[own[0]].clone()
    embeddings[own] = share * common + (1 - share**2) ** 0.5 * embeddings[own]


@cache
def _other_texts() -> tuple[str, ...]:
    """Everything that regular prompts are made of, and those of kinds beside the names."""
    lexicon, kinds = Lexicon.everyday(), [find_kind(name) for name in kind_names()]
    texts = [*lexicon.captions, *chain(*lexicon.words.values())]
    for kind in kinds:
        texts += [template.prompt for template in kind.templates]
        texts += chain(*kind.words.values(), *(known.other for known in kind.known.values()))
    return tuple(texts)
