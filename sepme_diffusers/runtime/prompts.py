"""Prompts as a call of a pipeline sees them, and what stacks read of one. The denoiser does not run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import Outline
from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.doors.family import TOKENS
from sepme_diffusers.runtime.call_arguments import CallArguments
from sepme_diffusers.runtime.erased_sets import Key
from sepme_diffusers.runtime.readings import DoorReading
from sepme_diffusers.runtime.spelled import spelled_by
from sepme_diffusers.runtime.stack import ActiveStack
from sepme_diffusers.text.encoding import encode_doors
from sepme_diffusers.text.rows import words_of_rows

Readings = dict[Key, tuple[DoorReading, ...]]
"""What concepts read of a prompt, at each door."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as a call sees it.

    Args:
        text: The prompt.
        embeddings: At each door, of one row, in the precision in which the denoiser is given it.
        words: The word of each token; None for one that stands for no word.
        spelled: The concepts that it spells, of those that have a gate.
    """

    text: str
    embeddings: Mapping[str, Tensor]
    words: Sequence[str | None]
    spelled: frozenset[Key]

    @torch.no_grad()
    def read_by(self, stacks: Iterable[tuple[str, ActiveStack]], outlines: Mapping[Key, Outline]) -> Readings:
        """Return what increments read of the prompt, and whether they are open.

        Args:
            stacks: They, with the door of each stack.
            outlines: What is known of them.

        Raises:
            ErasureNotInForce: If the prompt has no embedding for one of the doors.
        """
        found: Readings = {}
        for door, active in stacks:
            if door not in self.embeddings:
                raise ErasureNotInForce(f"the pipeline gives no embedding for the door {door!r}, where increments act")
            readings, opened = (values[0].cpu() for values in active.look(self.embeddings[door]))
            words = _most_read(readings, self.words) if door == TOKENS else [None] * len(opened)
            most = readings.amax(dim=0).tolist()
            for key, reading, may_act, word in zip(active.stack.slices, most, opened.tolist(), words, strict=True):
                gate = outlines[key].gates.get(door)
                found[key] = (*found.get(key, ()), DoorReading(door, reading, gate, may_act, word))
        return found


def _most_read(readings: Tensor, words: Sequence[str | None]) -> list[str | None]:
    """For each increment the word that it reads most, of readings (n_tokens, K); None if it reads nothing of one."""
    rows = [row for row, word in enumerate(words) if word is not None]
    if not rows:
        return [None] * readings.shape[1]
    most, where = readings[rows].max(dim=0)
    return [words[rows[row]] if reading else None for reading, row in zip(most.tolist(), where.tolist(), strict=True)]


def prompts_as_called(
    pipe: Any, texts: Sequence[str], keys: Sequence[Key], banks: Mapping[str, ConceptBank]
) -> list[Prompt]:
    """Encode prompts as a call of a pipeline does, and find the concepts that they spell.

    Args:
        pipe: The pipeline.
        texts: The prompts.
        keys: The concepts that may act.
        banks: {name: bank}.
    """
    doors = encode_doors(pipe, texts, dtype=None)
    spelled = spelled_by(CallArguments({"prompt": texts}).texts, keys, banks)
    n_rows = doors[TOKENS].shape[1]
    return [
        Prompt(text, {door: e[index : index + 1] for door, e in doors.items()}, _words(pipe, text, n_rows), named)
        for index, (text, named) in enumerate(zip(texts, spelled, strict=True))
    ]


def _words(pipe: Any, text: str, n_rows: int) -> list[str | None]:
    # Where there are several, their tokens stand in the same rows.
    tokenizer = getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)
    if tokenizer is not None and hasattr(pipe, "maybe_convert_prompt"):
        text = pipe.maybe_convert_prompt(text, tokenizer)  # textual inversions
    return words_of_rows(tokenizer, text, n_rows)
