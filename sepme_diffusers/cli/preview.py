"""`sepme preview`: see what the erasures of a bank do on a model of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sepme_diffusers.cli.base import load_base
from sepme_diffusers.cli.console import announce_loading, as_rich, console, refusals
from sepme_diffusers.cli.export import Precision

if TYPE_CHECKING:
    from sepme_diffusers.evaluation.preview.outcome import Preview
    from sepme_diffusers.evaluation.report import Table


def preview(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base model.")],
    bank: Annotated[str, typer.Argument(help="Folder or Hub id of the bank.")],
    erased: Annotated[
        list[str] | None,
        typer.Option(help="A concept to erase, alone; one option per concept. Default: the first 8 of the bank."),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for report.html, grid.png and pictures/, from which a second run goes on.")
    ] = Path("sepme-preview"),
    prompts: Annotated[
        int, typer.Option(min=1, help="Own prompts of each concept, neighbours, and regular prompts.")
    ] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the noise that every picture starts from.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps per picture.")] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance. Default: the pipeline's own.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels. Default: the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels. Default: the pipeline's own.")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Default: float16 on a GPU, float32 on the CPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps ... Default: the GPU, if there is one.")] = None,
    judge: Annotated[
        str | None,
        typer.Option(help='Scores the pictures: folder or Hub id of a CLIP model, or "pocket", the built-in judge.'),
    ] = None,
) -> None:
    """Draw each concept's prompts original, erased and restored; show what moved, on one page and in one picture.

    For each concept: prompts of its own, its second names, its neighbours, and regular prompts.

    A second run with the same options draws what is missing and nothing else.
    """
    announce_loading("the base model")
    from sepme_diffusers import ConceptBank
    from sepme_diffusers.evaluation import report
    from sepme_diffusers.evaluation.preview import page
    from sepme_diffusers.evaluation.preview.judges import find_judge
    from sepme_diffusers.evaluation.preview.kept import folder_for_pictures
    from sepme_diffusers.evaluation.preview.preview import Settings, chosen
    from sepme_diffusers.evaluation.preview.preview import preview as run

    settings = Settings(prompts, seed, steps, guidance, height, width)
    with refusals():
        loaded = ConceptBank.from_pretrained(bank)
        # What is wrong with the options is said before the model is loaded.
        chosen(loaded, erased)
        folder_for_pictures(output)
        judges = None if judge is None else find_judge(judge)
        pipe = load_base(base, device, dtype)
        with _progress() as advance:
            found = run(pipe, loaded, output, erased, settings, judges, advance)
        report.write(output, page.grid(found), page.page(found, Path(base).name if Path(base).is_dir() else base))
    console.print(as_rich(_summary(found)))
    if found.left_out:
        console.print(f"Left out: {len(found.left_out)} more concepts of the bank; name those to see by --erased")
    console.print(f"Wrote {output / 'report.html'} and {output / 'grid.png'}", soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Callable[[str, int], None]]:
    """Show progress while the block runs. It calls what this gives after every picture."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("drawing", total=None)
        yield lambda concept, total: progress.update(task, description=concept, total=total, advance=1)


def _summary(found: Preview) -> Table:
    from sepme_diffusers.evaluation.preview import page
    from sepme_diffusers.evaluation.report import Table

    rows = tuple(
        (sheet.concept, *(text for text, _ in page.summary(sheet)), *((page.judged(sheet),) if found.judge else ()))
        for sheet in found.sheets
    )
    return Table("What erasing does", page.columns(found), rows)
