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
        on_request: It takes long, and runs only where it is named.
    """

    name: str
    bar: str
    baseline: str
    run: Callable[[Runner], Iterator[Figure]]
    on_request: bool = False


def measure(
    bar: str, baseline: str, on_request: bool = False
) -> Callable[[Callable[[Runner], Iterator[Figure]]], Measure]:
    """Make a measure of a function, under the function's name.

    Args:
        bar: What every figure must be.
        baseline: What the figures are measured against.
        on_request: Whether it runs only where it is named.
    """
    return lambda run: Measure(run.__name__, bar, baseline, run, on_request)
