"""`sepme demo`: erase, compose and restore on the built-in model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sepme_diffusers.cli.console import announce_loading, as_rich, console

if TYPE_CHECKING:
    from sepme_diffusers.evaluation.protocols.demo import Outcome


def demo(
    output: Annotated[Path, typer.Option(help="Folder for grid.png and report.html.")] = Path("sepme-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 0,
    objects: Annotated[int, typer.Option(min=1, max=20, help="Objects drawn for each style.")] = 6,
) -> None:
    """Erase six styles of the built-in model, restore two of them, restore all; measure and draw each moment."""
    started = time.perf_counter()
    announce_loading("the built-in model")
    from sepme_diffusers.evaluation import report
    from sepme_diffusers.evaluation.protocols import demo as protocol

    with _progress() as on_moment:
        outcome = protocol.run(seed, objects, on_moment)
    for table in outcome.tables:
        console.print(as_rich(table))
    footer = _costs(outcome, time.perf_counter() - started)
    page = report.html_page(
        "Erase, compose, restore",
        f"Erased at once: {', '.join(protocol.ERASED)}; then {' and '.join(protocol.RESTORED)} restored. "
        "Every row starts from the same noise in all columns.",
        outcome.tables,
        outcome.grid,
        "Columns: " + ", ".join(protocol.MOMENTS),
        footer,
    )
    report.write(output, outcome.grid, page)
    console.print(footer)
    console.print(f"Wrote {output / 'grid.png'} and {output / 'report.html'}")


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show progress while the block runs, which calls what this gives before every moment."""
    from sepme_diffusers.evaluation.protocols.demo import ERASED, MOMENTS

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        erasing = progress.add_task(f"erasing {len(ERASED)} styles", total=None, state="")
        drawing = progress.add_task("drawing", total=len(MOMENTS), state="", visible=False)

        def on_moment(moment: str) -> None:
            progress.update(erasing, total=1, completed=1)
            progress.update(drawing, visible=True, completed=list(MOMENTS).index(moment), state=moment)

        yield on_moment
        progress.update(drawing, completed=len(MOMENTS))


def _costs(outcome: Outcome, seconds: float) -> str:
    return (
        f"Six increments made from their names, with nothing tuned: {outcome.seconds:.1f} s. "
        f"Whole demonstration: {seconds:.0f} s."
    )
