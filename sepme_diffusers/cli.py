"""The command line: parse, call, print. Heavy imports wait until a command runs, so that output starts at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from sepme_diffusers.evaluation.report import Table
    from sepme_diffusers.training import Step

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Separable concept erasure for diffusers.")
console = Console()


@app.callback()
def main() -> None:
    """Separable concept erasure for diffusers."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for grid.png and report.html.")] = Path("sepme-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 0,
    objects: Annotated[int, typer.Option(min=1, max=20, help="Objects drawn for each style.")] = 6,
) -> None:
    """Erase six styles of the built-in model, restore two of them, restore all; measure and draw each moment."""
    console.print("Loading torch and the built-in model ...")
    started = time.perf_counter()
    _quieten()
    from sepme_diffusers.evaluation import demo as demonstration
    from sepme_diffusers.evaluation import report

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        training = progress.add_task(
            f"erasing {demonstration.TRAINED}, paper's objective", total=None, state="drawing x_0"
        )
        drawing = progress.add_task("drawing", total=len(demonstration.MOMENTS), state="", visible=False)

        def on_step(step: Step) -> None:
            progress.update(training, state=f"step {step.step}  loss {step.loss:+.2e}  momentum {step.momentum:+.2e}")

        def on_moment(moment: str) -> None:
            progress.update(training, total=1, completed=1)
            progress.update(drawing, visible=True, completed=list(demonstration.MOMENTS).index(moment), state=moment)

        outcome = demonstration.run(seed, objects, on_step, on_moment)
        progress.update(drawing, completed=len(demonstration.MOMENTS))
    seconds = time.perf_counter() - started
    for table in outcome.tables:
        console.print(_rich(table))
    trained = outcome.bank[demonstration.TRAINED].metrics
    solved = outcome.bank[demonstration.SOLVED].metrics
    footer = (
        f"{demonstration.TRAINED}: {trained['steps']} steps of the paper's objective, {trained['seconds']:.0f} s. "
        f"{demonstration.SOLVED}: closed form, {solved['seconds']:.1f} s. Whole demonstration: {seconds:.0f} s."
    )
    page = report.html_page(
        "Erase, compose, restore",
        f"Erased at once: {', '.join(demonstration.ERASED)}; then {' and '.join(demonstration.RESTORED)} restored. "
        "Every row starts from the same noise in all columns.",
        outcome.tables,
        outcome.grid,
        "Columns: " + ", ".join(demonstration.MOMENTS),
        footer,
    )
    report.write(output, outcome.grid, page)
    console.print(footer)
    console.print(f"Wrote {output / 'grid.png'} and {output / 'report.html'}")


@app.command()
def sign(
    bank: Annotated[Path, typer.Argument(help="Folder of the bank.")],
    key: Annotated[Path, typer.Option(help="Private key: PEM file, elliptic curve.")],
    password: Annotated[str | None, typer.Option(envvar="SEPME_KEY_PASSWORD", help="Of the key.")] = None,
) -> None:
    """Sign a bank, so that load_sepme(..., require_signature=PUBLIC_KEY) accepts it. Needs sepme-diffusers[sign]."""
    from sepme_diffusers import signing

    try:
        signature = signing.sign(bank, key, password)
    except (ImportError, OSError, TypeError, ValueError) as error:
        console.print(f"Not signed: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    console.print(f"Wrote {signature}", soft_wrap=True)


@app.command()
def verify(
    bank: Annotated[Path, typer.Argument(help="Folder of a concept bank.", exists=True, file_okay=False)],
    base: Annotated[
        Path | None,
        typer.Option(help="Folder of its base model: also check the guards.", exists=True, file_okay=False),
    ] = None,
) -> None:
    """Check a bank's files, increments and guards, and list everything that is wrong; exit status 1 if anything is."""
    _quieten()
    from diffusers import DiffusionPipeline

    from sepme_diffusers.verify import verify as check

    pipe = None if base is None else DiffusionPipeline.from_pretrained(base, use_safetensors=True)
    report = check(bank, pipe)
    table = RichTable(title=escape(str(bank)))
    for column in ("concept", "form", "rank", "norm", "leakage", "verdict"):
        table.add_column(column)
    table.add_row("(bank)", "", "", "", "", _verdict(report.folder))
    for name, found in report.concepts.items():
        figures = ("" if value is None else f"{value:.3g}" for value in (found.rank, found.norm, found.leakage))
        table.add_row(escape(name), found.form or "", *figures, _verdict(found.faults))
    console.print(table)
    for note in report.notes:
        console.print(f"Note: {note}")
    console.print(f"{len(report.faults)} faults" if report.faults else "No faults")
    raise typer.Exit(not report.ok)


def _verdict(faults: tuple[str, ...]) -> str:
    # What a bank says is nobody's markup, and no command to a terminal.
    return "\n".join(escape("".join(c if c.isprintable() else "?" for c in fault)) for fault in faults) or "ok"


def _quieten() -> None:
    """Leave the terminal to our own progress: no loading bars, no hints about optional packages."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title)
    for column in table.columns:
        shown.add_column(column, justify="left" if column == table.columns[0] else "right")
    for row in table.rows:
        shown.add_row(*row)
    return shown


if __name__ == "__main__":
    app()
