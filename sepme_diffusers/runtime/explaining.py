"""Why a prompt is changed, or not: what each loaded concept reads of it, and whether its gate opens.

The denoiser does not run. What is said of a concept is what the stack of a call that erases it decides by; of very
many concepts the ones to be listed are found by their bases alone, which are read without the rest of an increment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sepme_diffusers.bank.entry import Outline
from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.doors.family import TOKENS
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.runtime.call_sets import Request, default_set, floors
from sepme_diffusers.runtime.erased_sets import Key
from sepme_diffusers.runtime.explanation import Explanation, PromptReading
from sepme_diffusers.runtime.prompts import Prompt, Readings, prompts_as_called
from sepme_diffusers.runtime.readings import ConceptReading, DoorReading
from sepme_diffusers.runtime.snapshot import Snapshot, Stacks
from sepme_diffusers.runtime.stack import ActiveStack, Stack
from sepme_diffusers.runtime.text_check import TextCheck
from sepme_diffusers.text.encoders import text_encoders
from sepme_diffusers.text.spelling import spells

# Concepts whose bases are looked at together.
_TOGETHER = 256

_Chosen = tuple[Sequence[Key], Sequence[ConceptReading]]


class Explainer:
    """Explains prompts on a pipeline with what is loaded and erased at the moment.

    Args:
        pipe: The pipeline.
        snapshot: What is loaded.
        request: What applies to the pipeline's calls.
        text_check: Of the snapshot's banks.

    Raises:
        ErasureNotInForce: If a bank that the request names has been unloaded since.
    """

    def __init__(self, pipe: Any, snapshot: Snapshot, request: Request, text_check: TextCheck) -> None:
        self._pipe, self._snapshot, self._text_check = pipe, snapshot, text_check
        self._erased, self._always = default_set(snapshot, request), floors(snapshot, request)

    def explain(self, prompt: str | Iterable[str], keys: Sequence[Key], limit: int) -> Explanation:
        """Read prompts by concepts, and list for each prompt those that act or come near.

        Args:
            prompt: One, or several.
            keys: The concepts.
            limit: How many are listed for each prompt.

        Raises:
            TypeError: If a prompt is no string.
            ValueError: If there is no prompt, or the limit is no number above zero.
            ErasureNotInForce: If the pipeline has no text encoder, or another one than the banks were made for.
        """
        texts = _texts(prompt)
        _refuse_limit(limit)
        if not keys:
            return Explanation(tuple(PromptReading(text, ()) for text in texts))
        if not text_encoders(self._pipe):
            raise ErasureNotInForce(
                "the pipeline has no text encoder, so nothing can be read of a prompt; explain it on a pipeline of "
                "the same model that has one"
            )
        prompts = prompts_as_called(self._pipe, texts, keys, self._snapshot.banks)
        chosen = self._chosen(prompts, keys, limit)
        return Explanation(tuple(self._listed(each, *parts) for each, parts in zip(prompts, chosen, strict=True)))

    def _chosen(self, prompts: Sequence[Prompt], keys: Sequence[Key], limit: int) -> list[_Chosen]:
        """For each prompt the concepts that are listed, and what the others look like."""
        if len(keys) <= limit:
            return [(keys, ())] * len(prompts)
        ranked = map(self._ranked, self._glances(prompts, keys))
        return [(list(rows)[:limit], list(rows.values())[limit:]) for rows in ranked]

    def _glances(self, prompts: Sequence[Prompt], keys: Sequence[Key]) -> list[Readings]:
        """What each concept's basis reads of each prompt."""
        least = self._text_check.least(self._pipe, ())
        found: list[Readings] = [{} for _ in prompts]
        for start in range(0, len(keys), _TOGETHER):
            outlines = self._outlines(keys[start : start + _TOGETHER])
            stacks = _stacks_of_bases(outlines)
            for prompt, readings in zip(prompts, found, strict=True):
                acting = [
                    (door, ActiveStack(stack, stack.mask([{}]), 1, least, stack.opened_for([prompt.spelled])))
                    for door, stack in stacks.items()
                ]
                readings.update(prompt.read_by(acting, outlines))
        return found

    def _ranked(self, glances: Readings) -> dict[Key, ConceptReading]:
        """What is erased first, then as it is listed."""
        rows = {key: self._row(key, doors) for key, doors in glances.items()}
        ranked = sorted(rows, key=lambda key: (rows[key].erased, *_rank(rows[key])), reverse=True)
        return {key: rows[key] for key in ranked}

    def _listed(self, prompt: Prompt, keys: Sequence[Key], rest: Sequence[ConceptReading]) -> PromptReading:
        read = self._read_as_a_call(prompt, keys)
        rows = [replace(self._row(key, doors), spelled=self._names_in(prompt, key)) for key, doors in read.items()]
        more_act = sum(row.acts for row in rest)
        return PromptReading(prompt.text, tuple(sorted(rows, key=_rank, reverse=True)), more_act, len(rest) - more_act)

    def _read_as_a_call(self, prompt: Prompt, keys: Sequence[Key]) -> Readings:
        """What concepts read of a prompt in a call that erases them."""
        least, outlines = self._text_check.least(self._pipe, keys), self._outlines(keys)
        # Stacks of its own: those that calls use stay as they are.
        snapshot = replace(self._snapshot, stacks=Stacks(outlines))
        active = snapshot.active([dict.fromkeys(keys, 1.0)], least=least, spelled=[prompt.spelled])
        assert active is not None
        module = [] if active.module is None else [(TOKENS, active.module)]
        doors = sorted(active.doors.items(), key=lambda item: item[0] != TOKENS)
        return prompt.read_by([*module, *doors], outlines)

    def _row(self, key: Key, doors: tuple[DoorReading, ...]) -> ConceptReading:
        shown = self._snapshot.names.shown[key]
        return ConceptReading(shown, doors, strength=self._erased.get(key, 0.0), always=key in self._always)

    def _names_in(self, prompt: Prompt, key: Key) -> tuple[str, ...]:
        spellings = self._outlines([key])[key].spellings
        return tuple(name for name in spellings if spells(prompt.text, [name]))

    def _outlines(self, keys: Iterable[Key]) -> dict[Key, Outline]:
        return {key: self._snapshot.banks[key[0]].entries.outline(key[1]) for key in keys}


def _texts(prompt: str | Iterable[str]) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if strange := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"a prompt is a string, and several are a list of strings, not {strange}")
    if not texts:
        raise ValueError("there is no prompt to explain; give one, or a list of them")
    return texts


def _refuse_limit(limit: Any) -> None:
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"the limit says how many concepts are listed, a whole number from 1 on, not {limit!r}")


def _rank(reading: ConceptReading) -> tuple[bool, float]:
    return reading.acts, reading.nearness


def _stacks_of_bases(outlines: Mapping[Key, Outline]) -> dict[str, Stack]:
    """Stacks, by door, of increments that read as these do and change nothing."""
    doors: dict[str, dict[Key, Increment]] = {}
    for key, outline in outlines.items():
        for door, a in outline.bases.items():
            doors.setdefault(door, {})[key] = Increment(a, B=torch.zeros_like(a).T, gate=outline.gates.get(door))
    return {door: Stack(increments) for door, increments in doors.items()}
