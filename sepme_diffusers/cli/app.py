"""The command line: parse, call, print. Heavy imports wait until a command runs, so that output starts at once."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from sepme_diffusers.cli import evaluation, making
from sepme_diffusers.cli.console import as_rich, console, quieten

if TYPE_CHECKING:
    from sepme_diffusers.making.trainer import Step

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Separable concept erasure for diffusers.")


app.command()(making.erase)
app.command()(making.capacity)
app.command("soft-guards")(making.soft_guards)
app.add_typer(evaluation.app, name="eval")


@app.callback()
def main() -> None:
    """Separable concept erasure for diffusers."""


class Format(str, Enum):
    """What `export` writes."""

    PEFT = "peft"
    DIFFUSERS = "diffusers"
    KOHYA = "kohya"
    CHECKPOINT = "checkpoint"
    SINGLE_FILE = "single-file"


class Precision(str, Enum):
    """Precisions that `export` casts a checkpoint to."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@app.command()
def export(
    bank: Annotated[str, typer.Argument(help="Folder or Hub id of the bank.")],
    base: Annotated[str, typer.Option(help="Folder or Hub id of the base model.")],
    erased: Annotated[list[str], typer.Option(help="A concept, or concept=strength; give one option a concept.")],
    output: Annotated[Path, typer.Option(help="What to write: a folder, or a file ending in .safetensors.")],
    format: Annotated[
        Format, typer.Option(help="peft, diffusers or kohya: a LoRA. checkpoint, single-file: the whole model, fused.")
    ] = Format.KOHYA,
    dtype: Annotated[Precision, typer.Option(help="Of a whole model; a LoRA is always float32.")] = Precision.FLOAT32,
) -> None:
    """Write an erased set for PEFT, diffusers, kohya's tools, ComfyUI and others."""
    console.print("Loading torch and the base model ...")
    quieten()
    import torch
    from diffusers import DiffusionPipeline

    from sepme_diffusers import ConceptBank
    from sepme_diffusers.interchange import export as exporting

    try:
        loaded, strengths = ConceptBank.from_pretrained(bank), dict(map(_strength, erased))
        pipe = DiffusionPipeline.from_pretrained(base)
        if format in (Format.CHECKPOINT, Format.SINGLE_FILE):
            kind = "single_file" if format is Format.SINGLE_FILE else "diffusers"
            precision = getattr(torch, dtype.value)
            written = exporting.export_checkpoint(loaded, pipe, strengths, output, kind, precision)
        else:
            written = exporting.export_lora(loaded, pipe, strengths, output, format.value)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"Wrote {written}, which erases {', '.join(strengths)}")
    if lost := exporting.gates_lost(loaded, strengths):
        console.print(f"Note: {lost}")


def _strength(asked: str) -> tuple[str, float]:
    """A concept, or concept=strength, as name and strength."""
    name, sign, strength = asked.rpartition("=")
    try:
        return (name, float(strength)) if sign else (asked, 1.0)
    except ValueError:
        return asked, 1.0  # a name that has a "=" of its own


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for grid.png and report.html.")] = Path("sepme-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 0,
    objects: Annotated[int, typer.Option(min=1, max=20, help="Objects drawn for each style.")] = 6,
) -> None:
    """Erase six styles of the built-in model, restore two of them, restore all; measure and draw each moment."""
    console.print("Loading torch and the built-in model ...")
    started = time.perf_counter()
    quieten()
    from sepme_diffusers.evaluation import report
    from sepme_diffusers.evaluation.protocols import demo as demonstration

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
        console.print(as_rich(table))
    steps = outcome.bank[demonstration.TRAINED].metrics["steps"]
    live = (demonstration.TRAINED, demonstration.SOLVED)
    made = {style: f"{outcome.figures[f'seconds to make {style}']:.1f} s" for style in live}
    footer = (
        f"{demonstration.TRAINED}: {steps} steps of the paper's objective, {made[demonstration.TRAINED]}. "
        f"{demonstration.SOLVED}: closed form, {made[demonstration.SOLVED]}. Whole demonstration: {seconds:.0f} s."
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
def bench(
    device: Annotated[str, typer.Option(help="Where: cpu, cuda, mps ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of timings for each ratio.")] = 5,
    only: Annotated[list[str] | None, typer.Option(help="One measure; may be given several times.")] = None,
) -> None:
    """Measure speed and memory, as ratios against a stated baseline. On two cores: about an hour for everything."""
    quieten()
    import torch

    from sepme_diffusers.evaluation.bench import inference as benchmarks

    if dtype not in ("float32", "float16", "bfloat16"):
        raise typer.BadParameter(f"{dtype!r} is none of float32, float16, bfloat16")
    chosen = benchmarks.Bench(device, getattr(torch, dtype), repeats)
    measured = []
    with console.status("...") as status:
        try:
            results = benchmarks.run(chosen, tuple(only or ()), status.update)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        try:
            measured.extend(results)
        finally:
            # Also those before one that failed: an hour's work is not lost.
            if measured:
                console.print(as_rich(benchmarks.table(chosen, measured)))


@app.command()
def sign(
    bank: Annotated[Path, typer.Argument(help="Folder of the bank.")],
    key: Annotated[Path, typer.Option(help="Private key: PEM file, elliptic curve.")],
    password: Annotated[str | None, typer.Option(envvar="SEPME_KEY_PASSWORD", help="Of the key.")] = None,
) -> None:
    """Sign a bank, so that load_sepme(..., require_signature=PUBLIC_KEY) accepts it. Needs sepme-diffusers[sign]."""
    from sepme_diffusers.bank import signing

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
    quieten()
    from diffusers import DiffusionPipeline

    from sepme_diffusers.bank.verify import verify as check

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


if __name__ == "__main__":
    app()
