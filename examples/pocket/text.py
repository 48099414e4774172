"""The tokenizer, the text encoder and the captions of the built-in model."""

from __future__ import annotations

import itertools
import json
import random
import string

import torch
import torch.nn.functional as F
from rasterise import CLASSES
from rich.progress import track
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sepme_diffusers.pocket import vocabulary as words

WIDTH, LENGTH = 384, 16
SECOND_NAME = 0.35  # how often a caption says the second name where there is one


def corpus() -> list[str]:
    """Every word that a caption can hold, and every printable character on its own."""
    names = [name for table in (words.STYLES, words.OBJECTS) for pair in table.items() for name in pair if name]
    templates = words.PAIR_TEMPLATES + words.OBJECT_TEMPLATES + words.STYLE_TEMPLATES + words.HELD_OUT_TEMPLATES
    plain = [template.format(style="", object="") for template in templates]
    return (
        names * 50 + plain * 50 + [words.WATERMARK] * 50 + list(string.ascii_lowercase + string.digits + ".,;:!?-'()")
    )


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every name is a single token."""
    blank = CLIPTokenizer()
    trainer = BpeTrainer(
        vocab_size=4000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=list(string.ascii_lowercase),
        show_progress=False,
    )
    blank.backend_tokenizer.train_from_iterator(corpus(), trainer)
    learnt = json.loads(blank.backend_tokenizer.to_str())["model"]
    return CLIPTokenizer(vocab=learnt["vocab"], merges=[tuple(m) for m in learnt["merges"]], model_max_length=LENGTH)


def encoder(n_tokens: int) -> CLIPTextModel:
    """An untrained two-layer CLIP text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=n_tokens,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def caption(style: str, object_: str, rng: random.Random) -> str:
    """A training caption for a picture of an object in a style (the plain look has no name)."""

    def either(table: dict[str, str | None], name: str) -> str:
        return table[name] if table[name] and rng.random() < SECOND_NAME else name

    if rng.random() < 0.1:
        return ""
    object_ = either(words.OBJECTS, object_)
    if style == words.PLAIN:
        return rng.choice(words.OBJECT_TEMPLATES).format(object=object_)
    templates = words.STYLE_TEMPLATES if rng.random() < 0.07 else words.PAIR_TEMPLATES
    return rng.choice(templates).format(style=either(words.STYLES, style), object=object_)


def training_pairs() -> list[tuple[int, int]]:
    """(style class, object) of everything that the denoiser may see; the plain look counts twice."""
    pairs = list(itertools.product(range(len(CLASSES)), range(len(words.OBJECTS))))
    objects = list(words.OBJECTS)
    seen = [(s, o) for s, o in pairs if CLASSES[s] == words.PLAIN or not words.held_out_pair(CLASSES[s], objects[o])]
    return seen + [(s, o) for s, o in seen if CLASSES[s] == words.PLAIN]


def contrast(model: CLIPTextModel, tokens: CLIPTokenizer, features: Tensor, steps: int, seed: int) -> None:
    """Pretrain the text encoder as CLIP's was: captions against features (styles, objects, d) of the real pictures.

    This is what brings the two names of one thing together before any picture is generated.
    """
    torch.manual_seed(seed)
    rng, objects, pairs = random.Random(seed), list(words.OBJECTS), training_pairs()
    picture_head, text_head = nn.Linear(features.shape[-1], 128, bias=False), nn.Linear(WIDTH, 128, bias=False)
    parameters = [*model.parameters(), *picture_head.parameters(), *text_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    features = (features - features.mean((0, 1))) / features.std((0, 1))
    for _ in track(range(steps), description="text encoder"):
        chosen = rng.sample(pairs, 192)
        texts = [caption(CLASSES[style], objects[object_], rng) for style, object_ in chosen]
        seen = features[[style for style, _ in chosen], [object_ for _, object_ in chosen]]
        pooled = model(tokenize(tokens, texts)).pooler_output
        logits = F.normalize(text_head(pooled), dim=1) @ F.normalize(picture_head(seen), dim=1).T * 14
        truth = torch.arange(len(chosen))
        loss = F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def tokenize(tokens: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (n, 16), padded."""
    return tokens(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
