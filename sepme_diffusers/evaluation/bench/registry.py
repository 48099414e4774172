"""Every measure of the benchmarks by name, and a run of them. To add one, write a function and list it here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from sepme_diffusers.evaluation.bench.by_name import by_name
from sepme_diffusers.evaluation.bench.denoising import loop_20_of_1000, loop_50_of_50, loop_built_in, mixed_batch
from sepme_diffusers.evaluation.bench.holding import adapters, disk_module, disk_text, loading, memory
from sepme_diffusers.evaluation.bench.joint import joint_training
from sepme_diffusers.evaluation.bench.keeping import (
    ten_thousand_loading,
    ten_thousand_saving,
    ten_thousand_verifying,
    two_of_ten_thousand,
)
from sepme_diffusers.evaluation.bench.many_concepts import ten_thousand_making
from sepme_diffusers.evaluation.bench.measure import Figure, Measure
from sepme_diffusers.evaluation.bench.overhead import hooks_50_of_50, text_check
from sepme_diffusers.evaluation.bench.runner import Runner
from sepme_diffusers.evaluation.bench.solving import guard_basis, hundred_concepts, steps_to_stop
from sepme_diffusers.evaluation.bench.switching import compiling, switching
from sepme_diffusers.evaluation.bench.training_step import training_step
from sepme_diffusers.evaluation.report import Table

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        hooks_50_of_50,
        text_check,
        loop_50_of_50,
        loop_20_of_1000,
        loop_built_in,
        mixed_batch,
        switching,
        memory,
        loading,
        disk_text,
        disk_module,
        adapters,
        compiling,
        guard_basis,
        training_step,
        joint_training,
        hundred_concepts,
        by_name,
        steps_to_stop,
        ten_thousand_making,
        ten_thousand_saving,
        ten_thousand_loading,
        two_of_ten_thousand,
        ten_thousand_verifying,
    )
}

Row = tuple[Measure, Figure]


def run(runner: Runner, only: Iterable[str] = (), on_measure: Callable[[str], None] | None = None) -> Iterator[Row]:
    """Run measures and yield each figure when it is ready, so that one that fails loses none before it.

    Args:
        runner: Says where and how often.
        only: Names out of `MEASURES`. Default: all that do not run on request alone.
        on_measure: Called with the name of each before it starts.

    Raises:
        ValueError: On an unknown name, before anything is measured.
    """
    names = list(only) or [name for name, measure in MEASURES.items() if not measure.on_request]
    if unknown := [name for name in names if name not in MEASURES]:
        raise ValueError(f"unknown measures {unknown}; there are {list(MEASURES)}")
    return _rows(runner, [MEASURES[name] for name in names], on_measure)


def _rows(runner: Runner, measures: Iterable[Measure], on_measure: Callable[[str], None] | None) -> Iterator[Row]:
    for measure in measures:
        if on_measure is not None:
            on_measure(measure.name)
        for figure in measure.run(runner):
            yield measure, figure


def table(runner: Runner, rows: Iterable[Row]) -> Table:
    """Tabulate figures with their bars and baselines."""
    cells = tuple(
        (figure.what, measure.bar, figure.value, measure.baseline, figure.detail) for measure, figure in rows
    )
    return Table(
        f"Speed and memory on {runner.device}, {runner.dtype}", ("", "bar", "measured", "against", "detail"), cells
    )
