"""What it takes to keep a bank of very many concepts: to save, load and verify it, and to add one more."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.checks.verify import verify
from sepme_diffusers.bank.disk.layout import MANIFEST
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.bank.fingerprint import Encoding
from sepme_diffusers.bank.guard_sets import GuardSet
from sepme_diffusers.evaluation.bench.measure import Figure, measure
from sepme_diffusers.evaluation.bench.processes import alone, peak_resident
from sepme_diffusers.evaluation.bench.runner import Runner
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.concept import BLANK, Concept
from sepme_diffusers.text.encoding import TOKENS

WIDTH, N_TOKENS = 768, 77
SIZE = 10_000


@measure("<= 60 MB, manifest <= 5 MB", "nothing saved", on_request=True)
def ten_thousand_saving(runner: Runner) -> Iterator[Figure]:
    """Save 10,000 text-side concepts of rank 1 in float16, and then one more."""
    yield from saving(SIZE)


@measure("<= 0.5 s, <= 50 MB", "a process that has loaded another bank", on_request=True)
def ten_thousand_loading(runner: Runner) -> Iterator[Figure]:
    """Load a bank of 10,000 concepts, in a process of its own."""
    yield from loading(SIZE, runner.repeats)


@measure("<= 0.1 s", "a process that has loaded another bank", on_request=True)
def two_of_ten_thousand(runner: Runner) -> Iterator[Figure]:
    """Load two concepts of 10,000, numbers included."""
    yield from loading_two(SIZE, runner.repeats)


@measure("<= 60 s", "nothing checked", on_request=True)
def ten_thousand_verifying(runner: Runner) -> Iterator[Figure]:
    """Verify a folder of 10,000 concepts: every file, every increment."""
    yield from verifying(SIZE)


def saving(size: int) -> Iterator[Figure]:
    """Measure `ten_thousand_saving` with so many concepts."""
    with tempfile.TemporaryDirectory() as folder:
        bank = bank_of(size)
        first, whole = _seconds(lambda: bank.save_pretrained(folder)), _files(folder)
        more = replace(bank[name(0)], concept=Concept("one more"))
        grown = ConceptBank.from_pretrained(folder).with_entries([more])
        again = _seconds(lambda: grown.save_pretrained(folder))
        written = [file for file, found in _files(folder).items() if whole.get(file) != found]
    detail = (
        f"manifest {whole[MANIFEST][0] / 1e6:.2f} MB; saved in {first:.1f} s; with one more concept in {again:.1f} s, "
        f"which writes {len(written)} files"
    )
    yield Figure(f"{size} concepts on disk", f"{sum(size for size, _ in whole.values()) / 1e6:.1f} MB", detail)


def loading(size: int, repeats: int) -> Iterator[Figure]:
    """Measure `ten_thousand_loading` with so many concepts."""
    with tempfile.TemporaryDirectory() as folder:
        bank_of(size).save_pretrained(folder)
        seconds, held = alone(_load, folder, None, repeats)
    detail = f"the median of {repeats}; {held / 1e6:.0f} MB at most"
    yield Figure(f"loading {size} concepts", f"{seconds:.2f} s", detail)


def loading_two(size: int, repeats: int) -> Iterator[Figure]:
    """Measure `two_of_ten_thousand` with so many concepts."""
    with tempfile.TemporaryDirectory() as folder:
        bank_of(size).save_pretrained(folder)
        seconds, held = alone(_load, folder, [name(size // 3), name(size - 1)], repeats)
    detail = f"the median of {repeats}; {held / 1e6:.0f} MB at most"
    yield Figure(f"loading 2 of {size}", f"{seconds:.3f} s", detail)


def verifying(size: int) -> Iterator[Figure]:
    """Measure `ten_thousand_verifying` with so many concepts."""
    with tempfile.TemporaryDirectory() as folder:
        bank_of(size).save_pretrained(folder)
        began = time.perf_counter()
        faults = verify(folder).faults
        taken = time.perf_counter() - began
    yield Figure(f"verifying {size} concepts", f"{taken:.1f} s", f"{len(faults)} faults; without a pipeline")


def name(index: int) -> str:
    """Return the name of a concept."""
    return f"concept number {index}"


def bank_of(size: int) -> ConceptBank:
    """Make a bank of random text-side increments of rank 1, which damp each other's names."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(size, 1, WIDTH, generator=draw).half(), torch.randn(size, WIDTH, 1, generator=draw).half()
    guards = GuardSet((BLANK, "watermark"), tuple(map(name, range(size))))
    config = SepMEConfig.linear(rank=1)
    templates, without = ["{concept}", "a picture of {concept}"], ["", "a picture"]
    figures = {"reach": 0.91, "dimensions_left": 189, "own_reading": 12.34, "regular_reading": 0.1234}
    entries = (
        Entry(
            Concept.from_template(name(i), templates, without),
            Increment(a[i], B=b[i] / WIDTH, gate=1.5),
            config,
            guards,
            {"leakage": round(1e-3 + 1e-7 * i, 7), **figures},
        )
        for i in range(size)
    )
    return ConceptBank(BaseModel("random numbers", {TOKENS: Encoding(WIDTH, N_TOKENS)})).with_entries(entries)


def _load(folder: str, concepts: list[str] | None, repeats: int) -> tuple[float, int]:
    """Load a bank: the median of its seconds, and the bytes by which the process grew at most the first time."""
    with tempfile.TemporaryDirectory() as other:
        bank_of(1).save_pretrained(other)
        ConceptBank.from_pretrained(other)
    taken, grown, before = [], 0, peak_resident()
    for _ in range(repeats):
        began = time.perf_counter()
        bank = ConceptBank.from_pretrained(folder, concepts)
        if concepts:
            dict(bank)
        taken.append(time.perf_counter() - began)
        grown = grown or peak_resident() - before
        del bank
    return statistics.median(taken), grown


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _files(folder: str) -> dict[str, tuple[int, int]]:
    """Return the size of each file, and when it was written."""
    return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in Path(folder).iterdir()}
