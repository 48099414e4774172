"""`sepme eval`: measure erasures on the built-in model, against their bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sepme_diffusers.cli.console import as_rich, console, quieten

if TYPE_CHECKING:
    from sepme_diffusers.evaluation.report import Bar, Table

app = typer.Typer(no_args_is_help=True, help="Measure erasures on the built-in model, against their bars.")

_SEED = 20_000
_NOTE = (
    "The built-in model, guidance 4, prompt templates and seeds that no edit saw. ACC is by the built-in "
    "judge, in brackets on the original's pictures from the same seeds. Perceptual distance has LPIPS's form and FID "
    "Fréchet's, both with the judge's features: they compare with other figures of this package only."
)
Output = Annotated[Path, typer.Option(help="Folder for the reports.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps a picture.")]
Seed = Annotated[int, typer.Option(help="Seed of the pictures.")]


@app.command()
def scenes(
    output: Output = Path("sepme-eval"),
    seed: Seed = _SEED,
    only: Annotated[list[str] | None, typer.Option(help='"styles" or "objects", or "styles-1": one scene.')] = None,
    pictures: Annotated[int, typer.Option(min=2, help="Of each concept at each moment.")] = 12,
    steps: Steps = 20,
    gates: Annotated[bool, typer.Option(help="Erase with gates, or in proportion, as a LoRA does.")] = True,
) -> None:
    """The paper's four scenes, for styles and for objects."""
    chosen = _chosen(only or [])
    with _working(sum(1 + len(numbers) for numbers in chosen.values())) as advance:
        from sepme_diffusers.evaluation import report
        from sepme_diffusers.evaluation.protocols import scene_report
        from sepme_diffusers.evaluation.protocols.making import GATED, LINEAR
        from sepme_diffusers.evaluation.protocols.scenes import SCENES, Stage

        found: list[Bar] = []
        for kind, numbers in chosen.items():
            stage, moments = Stage(kind, seed, pictures, steps, GATED if gates else LINEAR), []
            for number in numbers:
                said = f"{kind}, scene {number}"
                played = stage.play(number, lambda erased, said=said: advance(f"{said}: {erased} erased", 0))
                name, moments = f"{kind}-scene-{number}", [*moments, *played]
                page = report.markdown(
                    f"Scene {number}, {kind}", f"{_NOTE} {pictures} pictures a concept; FID is of {pictures} each.",
                    [scene_report.table(kind, played)], f"{name}.png",
                )  # fmt: skip
                data = {"kind": kind, "scene": number, "erased": SCENES[number], "concepts": stage.concepts}
                data |= {
                    "seed": seed,
                    "pictures": pictures,
                    "steps": steps,
                    "gates": gates,
                    "moments": scene_report.values(played),
                }
                report.save(output, name, page, data, scene_report.sheet(stage.originals(), played))
                advance(said, 1)
            advance(f"{kind}: six erased, more pictures", 0)
            six = stage.six_erased()
            found += scene_report.bars(kind, six, moments)
            data = {"seed": seed, "gates": gates, **scene_report.values([six])[0]}
            report.save(
                output, f"{kind}-six-erased", _page(f"Six {kind} erased", scene_report.table(kind, [six])), data
            )
            advance(kind, 1)
    _finish(output, "bars", "Bars", report.bars_table("Bars", found))


@app.command()
def many(
    output: Output = Path("sepme-eval"),
    seed: Seed = _SEED,
    pictures: Annotated[int, typer.Option(min=6, help="Of erased and of regular concepts, for each six.")] = 60,
    each: Annotated[int, typer.Option(min=1, help="Of each object, where half of all are erased.")] = 4,
    sixes: Annotated[int, typer.Option(min=1, help="Sixes of each sort drawn from the bank of any_six.")] = 2,
    steps: Steps = 20,
) -> None:
    """Half of all objects erased at once, beside UCE; and any six of one bank of any_six."""
    with _working(5 + 3 * sixes) as advance:
        from sepme_diffusers.evaluation.protocols import any_six, half_of_all
        from sepme_diffusers.evaluation.protocols.making import LINEAR
        from sepme_diffusers.evaluation.protocols.scenes import built_in
        from sepme_diffusers.evaluation.report import bars_table

        pipe = built_in()
        half = half_of_all.HalfOfAll(pipe, seed, each, steps)
        advance("making the increments of half of all objects", 0)
        bank = half.bank()
        advance("half of all objects: the original", 1)
        original = half.original()
        advance("half of all objects erased", 1)
        separate, restored = half.separate(bank), half.restored_change(bank, built_in())
        advance("half of all objects erased, without gates", 1)
        linear = half.separate(half.bank(LINEAR), "separate increments, without gates")
        advance("half of all objects: UCE", 1)
        fused, tries = half.fused(lambda name: advance(name, 0))
        advance("making a bank of everything", 1)
        whole, found = any_six.Everything(pipe, seed, pictures, steps), []
        full = whole.bank()
        for draw in any_six.draws(seed, sixes):
            advance(", ".join(draw.names), 0)
            found.append(whole.measure(full, draw))
            advance(draw.kind, 1)
        found_bars = [*half_of_all.half_bars(separate, fused, restored), *any_six.six_bars(found)]
        tables = half_of_all.half_table((original, separate, linear, fused), tries), any_six.six_table(full, found)
    _finish(output, "many", "Many concepts", bars_table("Bars", found_bars), *tables)


@app.command()
def variants(
    output: Output = Path("sepme-eval"),
    seed: Seed = _SEED,
    only: Annotated[list[str] | None, typer.Option(help="One variant; may be given several times.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Of each style.")] = 24,
    steps: Steps = 20,
) -> None:
    """Every variant of the method on the same two styles; and a bank on another UNet."""
    with _working(len(only or ()) or 14) as advance:
        from sepme_diffusers.evaluation.protocols import variants as making
        from sepme_diffusers.evaluation.protocols.scenes import built_in
        from sepme_diffusers.evaluation.report import bars_table

        names = list(only or making.VARIANTS)
        if unknown := [name for name in names if name not in making.VARIANTS]:
            raise typer.BadParameter(f"{unknown} are none of {list(making.VARIANTS)}")
        pipe = built_in()
        gallery = making.Gallery(pipe, seed, pictures, steps)
        shop = making.Workshop(pipe, lambda step: advance(f"{step.concept}: step {step.step}", 0))
        rows = [gallery.row("original", None)]
        for name in names:
            advance(name, 0)
            rows.append(gallery.row(name, *making.make(shop, name)))
            advance(name, 1)
        tables = [making.table(rows)]
        if not only:
            advance("the closed form on another UNet", 0)
            found = making.transfer(pipe, shop.bank(solver="closed_form").product, seed, 2 * pictures, steps)
            tables += [making.transfer_table(found), bars_table("Bars", making.transfer_bars(found))]
            advance("the closed form on another UNet", 1)
    _finish(output, "variants", "Variants", *tables)


def _page(title: str, *tables: Table) -> str:
    from sepme_diffusers.evaluation import report

    return report.markdown(title, _NOTE, tables)


def _chosen(only: list[str]) -> dict[str, list[int]]:
    """{kind: scene numbers} from names of kinds and scenes."""
    everything = {f"{kind}-{number}": (kind, number) for kind in ("styles", "objects") for number in range(1, 5)}
    wanted = [name for name in everything if not only or name in only or everything[name][0] in only]
    if unknown := set(only) - set(everything) - {"styles", "objects"}:
        raise typer.BadParameter(f"{sorted(unknown)} are none of styles, objects, {', '.join(everything)}")
    chosen: dict[str, list[int]] = {}
    for kind, number in map(everything.get, wanted):
        chosen.setdefault(kind, []).append(number)
    return chosen


@contextmanager
def _working(total: int) -> Iterator[Callable[[str, int], None]]:
    """Progress while a command works: call what this gives with what is done now, and how many parts are finished."""
    if find_spec("torchmetrics") is None:
        raise typer.BadParameter("sepme eval needs torchmetrics: pip install 'sepme-diffusers[eval]'")
    console.print("Loading torch and the built-in model ...")
    quieten()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=total)
        yield lambda said, finished: progress.update(task, description=said, advance=finished)


def _finish(output: Path, name: str, title: str, *tables: Table) -> None:
    """Print the tables, and write them as the last page."""
    from sepme_diffusers.evaluation import report

    for table in tables:
        console.print(as_rich(table))
    rows = {table.title: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in tables}
    report.save(output, name, _page(title, *tables), rows)
    console.print(f"Wrote {output}", soft_wrap=True)
