"""What a measure of the benchmarks is: a function with a name, a bar and a baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sepme_diffusers.evaluation.bench.runner import Runner


@dataclass(frozen=True)
class Figure:
    """A measured value: what was measured, the value with its unit, and what it is made of."""

    what: str
    value: str
    detail: str


@dataclass(frozen=True)
class Measure:
    """A function that measures speed or memory.

    Args:
        name: What `sepme bench --only` calls it.
        bar: What every figure must be.
        baseline: What the figures are measured against.
        run: Measures; yields each figure when it is ready.
    """

    name: str
    bar: str
    baseline: str
    run: Callable[[Runner], Iterator[Figure]]


def measure(bar: str, baseline: str) -> Callable[[Callable[[Runner], Iterator[Figure]]], Measure]:
    """Make a measure of a function, under the function's name.

    Args:
        bar: What every figure must be.
        baseline: What the figures are measured against.
    """
    return lambda run: Measure(run.__name__, bar, baseline, run)
