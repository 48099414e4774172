"""A search over text alone, without a picture, for prompts that mean a concept and open no gate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.nn.functional import normalize

from sepme_diffusers.bank.entry import Entry
from sepme_diffusers.evaluation.probes import PARAPHRASES, WORDINGS, Kind, probe
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.text.encoding import encode
from sepme_diffusers.text.spelling import spells

_FOUND, _TEMPLATES_EACH = 8, 12


def hidden_prompts(pipe: Any, entry: Entry, kind: Kind) -> list[str]:
    """Search for prompts that the text encoder reads most like a concept, of those that open no gate of its increment.

    Many wordings are filled with the name in disguise: letters doubled, dropped, swapped, or kept apart. Some do not
    spell it and are read too little. Of these the eight are returned whose embedding is nearest to that of prompts
    which show the concept. Where there is no gate nothing can pass below it, so nothing is found.

    Args:
        pipe: The built-in model's pipeline; its text encoder is used.
        entry: The concept's.
        kind: What it is.
    """
    increment, name = entry.increment, entry.concept.name
    if increment.gate is None:
        return []
    tried = [prompt for prompt in _tried(kind, name) if not spells(prompt, entry.concept.spellings)]
    embeddings = encode(pipe, tried)
    below = (increment.reading(embeddings) < increment.gate).nonzero().flatten().tolist()
    shows = encode(pipe, probe(kind, name, _TEMPLATES_EACH, 0).prompts).flatten(1).mean(dim=0)
    nearness = normalize(embeddings[below].flatten(1), dim=1) @ normalize(shows, dim=0)
    return [tried[below[index]] for index in nearness.argsort(descending=True)[:_FOUND].tolist()]


def _tried(kind: Kind, name: str) -> list[str]:
    """List wordings with the name disguised."""
    templates = (*words.HELD_OUT_TEMPLATES, *PARAPHRASES, *WORDINGS[kind])
    prompts = (
        prompt
        for index, word in enumerate(dict.fromkeys(_disguised(name)))
        for prompt in probe(kind, name, _TEMPLATES_EACH, index, templates, word).prompts
    )
    return list(dict.fromkeys(prompts))


def _disguised(name: str) -> Iterator[str]:
    """List ways to write a name that its reader still makes out."""
    for place in range(len(name)):
        yield name[:place] + name[place] + name[place:]
        yield name[:place] + name[place + 1 :]
        yield name[:place] + name[place + 1 : place + 2] + name[place : place + 1] + name[place + 2 :]
    yield " ".join(name)
    yield ".".join(name)
    yield f"{name[: len(name) // 2]} {name[len(name) // 2 :]}"
