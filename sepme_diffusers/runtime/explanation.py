"""Explanation: what concepts read of prompts, as a sentence, a table and plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from sepme_diffusers.runtime.readings import ConceptReading
from sepme_diffusers.text.names import some

# How many concepts a sentence names.
_NAMED = 4
_HEADS = ("concept", "erased", "acts", "spelled", "door", "reads", "gate", "word")


@dataclass(frozen=True)
class PromptReading:
    """What the concepts read of one prompt.

    Args:
        prompt: The prompt.
        concepts: Those that act, then those that do not, each from the nearest to the farthest from its gate. Of very
            many what is erased is listed first of all, and no more than was asked for.
        more_act: How many acting ones are not listed.
        more_do_not: How many of the others.
    """

    prompt: str
    concepts: tuple[ConceptReading, ...]
    more_act: int = 0
    more_do_not: int = 0

    def __getitem__(self, concept: str) -> ConceptReading:
        """Return what a concept reads, by its name.

        Raises:
            KeyError: If it is not listed.
        """
        for reading in self.concepts:
            if reading.concept == concept:
                return reading
        listed = some(reading.concept for reading in self.concepts)
        raise KeyError(f"{concept!r} is not listed here; ask for it with concepts=[{concept!r}]. Listed: {listed}")

    @property
    def sentence(self) -> str:
        """Say what a call with this prompt does, what is erased first."""
        named = sorted(self.concepts, key=lambda reading: not reading.erased)[:_NAMED]
        said = "; ".join(reading.verdict for reading in named) or "no concept is loaded or asked for"
        act = sum(reading.acts for reading in self.concepts) - sum(reading.acts for reading in named) + self.more_act
        count = len(self.concepts) - len(named) + self.more_act + self.more_do_not
        share = "all" if act == count else act or "none"
        more = f"; {share} of {count} more would act if erased" if count else ""
        return f"{self.prompt!r}: {said}{more}"

    def lines(self) -> list[tuple[str, ...]]:
        """Return a table: its heads, then a line for each concept and door."""
        return [_HEADS, *(line for reading in self.concepts for line in reading.cells())]

    @property
    def rest(self) -> str:
        """Count what is not listed, in words; empty if everything is."""
        if not self.more_act + self.more_do_not:
            return ""
        return f"{self.more_act} more act where they are erased, {self.more_do_not} do not"


@dataclass(frozen=True)
class Explanation:
    """Why prompts are changed, or not, by what a pipeline has loaded. Printed, it is a table for each prompt.

    Args:
        prompts: What was read of each prompt, in their order.
    """

    prompts: tuple[PromptReading, ...]

    def __str__(self) -> str:
        return "\n\n".join("\n".join(_paragraph(reading)) for reading in self.prompts)

    def _repr_html_(self) -> str:
        """Tabulate the readings, for notebooks."""
        return "".join(_html(reading) for reading in self.prompts)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"prompts": [_plain(reading) for reading in self.prompts]}


def _paragraph(reading: PromptReading) -> list[str]:
    lines = reading.lines() if reading.concepts else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [reading.sentence, *table, *filter(None, [reading.rest])]


def _html(reading: PromptReading) -> str:
    head, *body = reading.lines()
    rows = "".join(_html_row(line, "td") for line in body)
    table = f"<table><thead>{_html_row(head, 'th')}</thead><tbody>{rows}</tbody></table>" if body else ""
    rest = f"<p>{reading.rest}</p>" if reading.rest else ""
    return f"<p>{escape(reading.sentence)}</p>{table}{rest}"


def _html_row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _plain(reading: PromptReading) -> dict[str, Any]:
    concepts = [{**asdict(concept), "erased": concept.erased, "acts": concept.acts} for concept in reading.concepts]
    return {**asdict(reading), "concepts": concepts, "sentence": reading.sentence}
