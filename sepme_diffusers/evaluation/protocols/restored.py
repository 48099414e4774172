"""Restored in context: a concept is restored while all others of its bank stay erased, and drawn in many wordings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.pictures import generate
from sepme_diffusers.evaluation.probes import PARAPHRASES, WORDINGS, Kind, probe
from sepme_diffusers.evaluation.report import Bar, Table
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.text.spelling import mentions

# The least share of prompts that must be as if nothing had ever been erased.
_BAR = 99.0
_WORST = 5


@dataclass(frozen=True)
class Restored:
    """What was found for one bank.

    Args:
        kind: What it erases.
        concepts: How many concepts it holds; each is restored in turn.
        prompts: How many prompts were read.
        unmoved: Of how many no active increment changes the embedding: by no bit, at any door.
        movers: {what moved: prompts}: "concept moved by another".
        drawn: How many of the prompts were drawn as well.
        as_read: Of how many pictures the bits are equal to the original's if, and only if, the embedding is unmoved.
    """

    kind: Kind
    concepts: int
    prompts: int
    unmoved: int
    movers: dict[str, int]
    drawn: int
    as_read: int

    @property
    def share(self) -> float:
        """The share of prompts that are unmoved, percent."""
        return 100 * self.unmoved / self.prompts


class RestoredRunner:
    """Restores each concept of a bank in turn, with all others erased.

    Args:
        pipe: The built-in model's pipeline, with no bank loaded.
        kind: What the bank erases.
        each: Prompts of each concept.
        pictures: How many prompts are drawn.
        seed: Of the pictures.
        steps: Denoising steps per picture.
    """

    def __init__(self, pipe: Any, kind: Kind, each: int, pictures: int, seed: int, steps: int) -> None:
        self.pipe, self.kind, self.each = pipe, kind, each
        self.pictures, self.seed, self.steps = pictures, seed, steps

    def measure(self, bank: ConceptBank) -> Restored:
        """Read every prompt as a call would that erases all other concepts, and draw some of them."""
        movers: Counter[str] = Counter()
        read: list[tuple[str, str, bool]] = []
        self.pipe.load_sepme(bank)
        try:
            for name in bank:
                others = [other for other in bank if other != name]
                for found in self.pipe.explain(self.prompts(name, others), concepts=others, limit=len(others)).prompts:
                    acting = [reading.concept for reading in found.concepts if reading.acts]
                    movers.update(f"{name} moved by {other}" for other in acting)
                    read.append((name, found.prompt, not acting))
            drawn = read[:: max(1, len(read) // self.pictures)][: self.pictures]
            as_read = sum(self._as_read(bank, drawn))
        finally:
            self.pipe.unload_sepme()
        unmoved = sum(still for _, _, still in read)
        return Restored(self.kind, len(bank), len(read), unmoved, dict(movers), len(drawn), as_read)

    def prompts(self, name: str, others: Sequence[str]) -> list[str]:
        """Write prompts for a concept: held-out templates, paraphrases, and wordings of no kind.

        Args:
            name: The concept.
            others: What is erased. Prompts that name one of these are left out, for there it should act.
        """
        templates = (*words.HELD_OUT_TEMPLATES, *PARAPHRASES, *WORDINGS[self.kind])
        asked = probe(self.kind, name, self.each, self.seed, templates)
        return [prompt for prompt in asked.prompts if not mentions(prompt, others)]

    def _as_read(self, bank: ConceptBank, chosen: Sequence[tuple[str, str, bool]]) -> Iterator[bool]:
        """Tell for each prompt whether its picture is the original's exactly where the embedding is unmoved."""
        prompts = [prompt for _, prompt, _ in chosen]
        before = generate(self.pipe, prompts, self.seed, self.steps, erased=[[]] * len(prompts))
        sets = [[other for other in bank if other != name] for name, _, _ in chosen]
        after = generate(self.pipe, prompts, self.seed, self.steps, erased=sets)
        for (_, _, still), one, other in zip(chosen, before, after, strict=True):
            yield (one.tobytes() == other.tobytes()) == still


def bars(results: Sequence[Restored]) -> list[Bar]:
    """Compare with the bar for prompts of restored concepts."""
    return [
        Bar(
            f"{result.kind}, one restored and {result.concepts - 1} erased: prompts equal to the bit",
            f">= {_BAR:g} %",
            f"{result.share:.1f} %",
            result.share >= _BAR,
        )
        for result in results
    ]


def table(results: Sequence[Restored]) -> Table:
    """Tabulate a row for each bank, with what moves where something does."""

    def where(result: Restored) -> str:
        worst = sorted(result.movers, key=lambda pair: result.movers[pair], reverse=True)[:_WORST]
        return ", ".join(f"{pair} ({result.movers[pair]})" for pair in worst)

    rows = tuple(
        (
            result.kind, str(result.concepts), str(result.prompts), str(result.unmoved),
            f"{result.as_read} of {result.drawn}", where(result),
        )
        for result in results
    )  # fmt: skip
    columns = ("bank", "concepts", "prompts", "equal to the bit", "pictures as read", "most moved (prompts)")
    return Table("Restored in context", columns, rows)
