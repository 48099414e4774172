"""A prompt that spells a concept opens its gate, whatever the increment reads."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import Concept
from sepme_diffusers.text.spelling import spells
from small import latents

SHUT = 1e6


@pytest.fixture(scope="module")
def shut_bank(text_bank):
    """Gates that nothing read can open; "neon" has an alias, and a word that is ambiguous."""
    entries = {}
    for name, entry in text_bank.items():
        entries[name] = replace(entry, increment=replace(entry.increment, gate=SHUT))
    concept = replace(text_bank["neon"].concept, aliases=("glowing", "bright"), spelled=("neon", "glowing"))
    return text_bank.with_entries([*entries.values(), replace(entries["neon"], concept=concept)])


def moved(pipe, prompt, erased, **settings):
    """For each picture whether erasing changes it."""
    pictures = [latents(pipe, prompt, erased=names, **settings) for names in ([], erased)]
    return [not torch.equal(before, after) for before, after in zip(*pictures, strict=True)]


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("a cat in the style of neon", True),
        ("a glowing cat", True),
        ("NEON cat", True),
        ("a ne\u03bfn cat", True),  # a Greek letter
        ("a bright cat", False),
        ("a neonatal ward", False),
        ("a dog", False),
    ],
)
def test_names_and_aliases_open_the_gate_and_other_words_do_not(pipe, shut_bank, prompt, opens):
    pipe.load_sepme(shut_bank)
    assert moved(pipe, prompt, ["neon"]) == [opens]


def test_each_prompt_of_a_batch_opens_gates_of_its_own_picture(pipe, shut_bank):
    pipe.load_sepme(shut_bank)
    assert moved(pipe, ["a dog", "a neon dog"], ["neon"]) == [False, True]
    assert moved(pipe, ["a neon dog", "a dog"], ["neon"], num_images_per_prompt=2) == [True, True, False, False]


def test_what_is_not_erased_is_not_opened(pipe, shut_bank):
    pipe.load_sepme(shut_bank)
    assert moved(pipe, "a neon dog", ["pencil"]) == [False]


def test_with_embeddings_of_the_caller_only_what_is_read_decides(pipe, shut_bank):
    pipe.load_sepme(shut_bank)
    embeddings, negative = pipe.encode_prompt("a neon dog", "cpu", 1, True)
    given = {"prompt_embeds": embeddings, "negative_prompt_embeds": negative}
    assert moved(pipe, None, ["neon"], **given) == [False]
    assert pipe.last_call.text == "unknown"


def test_the_receipt_says_which_gates_opened(pipe, shut_bank):
    pipe.load_sepme(shut_bank)
    latents(pipe, ["a neon dog", "a dog"], erased=["neon"])
    assert pipe.last_call.opened == ({"neon": True}, {"neon": False})


def test_guards_stay_exact(pipe, shut_bank):
    """A guard that spells the concept reads nothing of it all the same."""
    pipe.load_sepme(shut_bank)
    assert moved(pipe, ["", "watermark", "pencil"], ["neon"]) == [False, False, False]


def test_aliases_are_kept_on_the_disk(shut_bank, tmp_path):
    shut_bank.save_pretrained(tmp_path / "bank")
    loaded = type(shut_bank).from_pretrained(tmp_path / "bank")
    assert loaded["neon"].concept == shut_bank["neon"].concept
    assert loaded["neon"].concept.spellings == ("neon", "glowing")


def test_a_concept_of_a_kind_is_kept_without_its_prompts(text_bank, tmp_path):
    concept = Concept.object("cat", aliases=["kitty", "cats"])
    text_bank.with_entries([replace(text_bank["cat"], concept=concept)]).save_pretrained(tmp_path / "bank")
    assert type(text_bank).from_pretrained(tmp_path / "bank")["cat"].concept == concept


@pytest.mark.parametrize("prompt", ["van  gogh", "Van-Gogh's sky", "in the style of Vаn Gogh"])
def test_spelling_is_seen_through(prompt):
    assert spells(prompt, ["Van Gogh"])
