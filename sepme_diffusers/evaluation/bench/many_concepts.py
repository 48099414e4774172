"""What it takes to make a bank of very many concepts: embeddings like those of text, and the way to a saved bank."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sepme_diffusers.algebra.closed_form import covariance
from sepme_diffusers.bank.entry import BaseModel
from sepme_diffusers.bank.fingerprint import Encoding
from sepme_diffusers.evaluation.bench.measure import Figure, measure
from sepme_diffusers.evaluation.bench.processes import alone, peak_resident
from sepme_diffusers.evaluation.bench.runner import Runner
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.calibration import RegularRows
from sepme_diffusers.making.embedded import EmbeddedConcept
from sepme_diffusers.making.guards import NAMES_AT_A_TIME, Guards
from sepme_diffusers.making.maker import bank_from_embeddings
from sepme_diffusers.making.measure import Embeddings
from sepme_diffusers.making.plan import Problem
from sepme_diffusers.text.concept import BLANK, Concept
from sepme_diffusers.text.encoding import TOKENS

N_TOKENS, WIDTH, N_PROMPTS, N_REGULAR = 77, 768, 10, 200
# A quarter of an hour for 10,000 concepts: it runs when it is named.
SIZE = 10_000
# Directions into which a word is written, and how many rows a template has before it.
_MIXED, _LONGEST = 8, 10
_KINDS = 20


class SyntheticText:
    """Embeddings like those of a causal text encoder, each a function of a template's number and a word's.

    The first row is the same in every prompt. Those of a template before its word are the same whatever the word. All
    rows from the word on carry it, at each position in another way.

    Args:
        n_tokens: Rows of a prompt.
        d: Their width.
        n_templates: How many templates there are; number 0 is the word alone.
    """

    def __init__(self, n_tokens: int = N_TOKENS, d: int = WIDTH, n_templates: int = N_PROMPTS + 1) -> None:
        draw = torch.Generator().manual_seed(0)
        self.n_tokens, self.d = n_tokens, d
        self._empty = torch.randn(n_templates, n_tokens, d, generator=draw)
        self._empty[:, 0] = 4 * self._empty[0, 0]
        starts = [1, *(2 + number % min(_LONGEST, n_tokens // 2) for number in range(n_templates - 1))]
        carries = torch.arange(n_tokens) >= torch.tensor(starts)[:, None]
        self._read = 0.1 * self._empty * carries[:, :, None]
        self._shares = torch.randn(n_tokens, _MIXED, generator=draw) * carries[:, :, None] / _MIXED**0.5

    def blank(self) -> Tensor:
        """Return the embedding of no word in no template, (1, n_tokens, d)."""
        return self._empty[:1]

    def prompts(self, word: int, first: int, last: int | None = None) -> Tensor:
        """Return the embeddings of a word in one template, or in those from the first to the last.

        Args:
            word: The word's number.
            first: The template's.
            last: The last template's. Default: the first.

        Returns:
            The embeddings, (n_templates, n_tokens, d).
        """
        templates = slice(first, (first if last is None else last) + 1)
        meaning = torch.randn(self.d, generator=torch.Generator().manual_seed(word))
        written = torch.stack([meaning.roll(97 * index) for index in range(_MIXED)])
        # What comes before a word changes how it is read.
        embeddings = torch.addcmul(self._empty[templates], self._read[templates], meaning)
        return embeddings.view(-1, self.d).addmm_(self._shares[templates].flatten(0, 1), written).view_as(embeddings)


def make_many(
    size: int = SIZE, folder: str | None = None, n_tokens: int = N_TOKENS, d: int = WIDTH
) -> dict[str, float]:
    """Make a bank of so many text-side concepts and save it, for a process that does nothing else.

    Args:
        size: How many.
        folder: Where the bank is saved. Default: nowhere that lasts.
        n_tokens: Rows of a prompt.
        d: Their width.

    Returns:
        Seconds of the whole and of its parts, and the peak of the process's memory in bytes.
    """
    started = time.perf_counter()
    text = SyntheticText(n_tokens, d)
    # After the concepts' own words there are those of regular prompts, and the anchors'.
    regular = torch.cat([text.prompts(size + n, 1 + n % N_PROMPTS) for n in range(N_REGULAR)])
    regular_rows = RegularRows.of(regular)
    soft = covariance(regular_rows.rows)
    hard = text.blank()
    config = SepMEConfig(soft_guard_weight=300.0)
    guards = Guards([BLANK], hard, config)
    problem = Problem(guards, lambda _: soft, regular=lambda _: regular_rows)
    base = BaseModel("synthetic text", {TOKENS: Encoding(d, n_tokens)})
    clock = _Clock()

    def names() -> Iterator[tuple[Sequence[str], Embeddings]]:
        for start in range(0, size, NAMES_AT_A_TIME):
            words = range(start, min(start + NAMES_AT_A_TIME, size))
            embeddings = torch.cat([text.prompts(word, 0) for word in words])
            yield [f"concept {word}" for word in words], {TOKENS: embeddings}
        clock.mark("leaks" if "solved" in clock.parts else "names")

    def concepts() -> Iterator[EmbeddedConcept]:
        # Concepts of a kind share their anchors.
        kinds = [text.prompts(size + N_REGULAR + kind, 1, N_PROMPTS) for kind in range(_KINDS)]
        for word in range(size):
            yield embedded(text, word, kinds[word % _KINDS])
        clock.mark("solved")

    bank = bank_from_embeddings(base, problem, {TOKENS: hard}, names, concepts(), compact=True)
    with tempfile.TemporaryDirectory() as temporary:
        bank.save_pretrained(Path(folder or temporary) / "bank")
    clock.mark("saved")
    return {**clock.parts, "seconds": time.perf_counter() - started, "peak": float(peak_resident())}


def embedded(text: SyntheticText, word: int, anchors: Tensor) -> EmbeddedConcept:
    """Embed a concept in ten templates.

    Args:
        text: Embeds it.
        word: The number of its word.
        anchors: What it is mapped to, (10, n_tokens, d).
    """
    name = f"concept {word}"
    pairs = tuple((f"template {n} with {name}", f"template {n}") for n in range(1, N_PROMPTS + 1))
    own = text.prompts(word, 1, N_PROMPTS)
    return EmbeddedConcept(Concept(name, pairs), own, anchors, text.prompts(word, 0)[0])


class _Clock:
    """Seconds of each part of the work, added up."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now


@measure("<= 20 min, <= 4 GB", "nothing: a bar in minutes and GB", on_request=True)
def ten_thousand_making(runner: Runner) -> Iterator[Figure]:
    """Make a bank of 10,000 text-side concepts at d 768 x 77, of embeddings that are given piece by piece."""
    runner.free_large()
    yield from figures(SIZE, alone(make_many, SIZE))


def figures(size: int, taken: dict[str, float]) -> Iterator[Figure]:
    """Give what `make_many` took as figures.

    Args:
        size: How many concepts it made.
        taken: What it returned.
    """
    seconds = taken["seconds"]
    parts = ", ".join(f"{part} {taken[part]:.0f} s" for part in ("names", "solved", "leaks", "saved"))
    detail = f"{1e3 * seconds / size:.0f} ms per concept, {WIDTH} x {N_TOKENS}, rank 1, float16: {parts}"
    yield Figure(f"making a bank of {size} concepts", f"{seconds / 60:.1f} min", detail)
    yield Figure(f"memory of making {size} concepts", f"{taken['peak'] / 1e9:.2f} GB", "peak of the process")
