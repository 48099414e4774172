"""`sepme eval`: measure erasures on the built-in model, against their bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sepme_diffusers.cli.base import load_base
from sepme_diffusers.cli.console import announce_loading, as_rich, console, refusals
from sepme_diffusers.cli.export import Precision

if TYPE_CHECKING:
    from PIL import Image

    from sepme_diffusers.bank.bank import ConceptBank
    from sepme_diffusers.evaluation.probes import Kind
    from sepme_diffusers.evaluation.protocols.scenes import Moment, SceneRunner
    from sepme_diffusers.evaluation.report import Bar, Table

app = typer.Typer(no_args_is_help=True, help="Measure erasures on the built-in model, against their bars.")

_SEED = 20_000
_NOTE = (
    "The built-in model, guidance 4, prompt templates and seeds that no edit saw. ACC is by the built-in "
    "judge, in brackets on the original's pictures from the same seeds. Perceptual distance has LPIPS's form and FID "
    "Fréchet's, both with the judge's features: they compare with other figures of this package only."
)
Output = Annotated[Path, typer.Option(help="Folder for the reports.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps per picture.")]
Seed = Annotated[int, typer.Option(help="Seed of the pictures.")]


@app.command()
def scenes(
    output: Output = Path("sepme-eval"),
    seed: Seed = _SEED,
    only: Annotated[
        list[str] | None, typer.Option(help='"styles" or "objects", or "styles-1", "styles-3-guarded": one scene.')
    ] = None,
    pictures: Annotated[int, typer.Option(min=2, help="Of each concept at each moment.")] = 12,
    steps: Steps = 20,
    gates: Annotated[bool, typer.Option(help="Erase with gates, or in proportion, as a LoRA does.")] = True,
) -> None:
    """Play the paper's four scenes, for styles and for objects; the third in three ways."""
    chosen = _chosen(only or [])
    settings = {"seed": seed, "pictures": pictures, "steps": steps, "gates": gates}
    bars: list[Bar] = []
    with _progress(sum(1 + len(numbers) for numbers in chosen.values())) as advance:
        from sepme_diffusers.evaluation import report
        from sepme_diffusers.evaluation.protocols import scene_report
        from sepme_diffusers.evaluation.protocols.scenes import SceneRunner

        for kind, numbers in chosen.items():
            runner = SceneRunner(kind, seed, pictures, steps, gates)
            moments = [moment for number in numbers for moment in _played(runner, number, output, settings, advance)]
            advance(f"{kind}: six erased, more pictures", 0)
            six = runner.six_erased()
            bars += scene_report.bars(kind, six, moments)
            page = _page(f"Six {kind} erased", scene_report.table(kind, [six]))
            data = {"seed": seed, "gates": gates, **scene_report.values([six])[0]}
            report.save(output, f"{kind}-six-erased", page, data)
            advance(kind, 1)
    _finish(output, "bars", "Bars", report.bars_table("Bars", bars))


def _played(
    runner: SceneRunner, number: str, output: Path, settings: dict[str, Any], advance: Callable[[str, int], None]
) -> list[Moment]:
    """Play a scene and write its page, its figures and its pictures."""
    from sepme_diffusers.evaluation import report
    from sepme_diffusers.evaluation.protocols import scene_report
    from sepme_diffusers.evaluation.protocols.scene_list import SCENES

    kind, name = runner.kind, f"{runner.kind}-scene-{number}"
    moments = runner.play(number, lambda erased: advance(f"{kind}, scene {number}: {erased} erased", 0))
    note = f"{_NOTE} {runner.pictures} pictures per concept; FID is of {runner.pictures} each."
    page = report.markdown(f"Scene {number}, {kind}", note, [scene_report.table(kind, moments)], f"{name}.png")
    data = {"kind": kind, "scene": number, "erased": SCENES[number].erased, "concepts": runner.concepts, **settings}
    data["moments"] = scene_report.values(moments)
    report.save(output, name, page, data, scene_report.sheet(runner.originals(), moments))
    advance(f"{kind}, scene {number}", 1)
    return moments


@app.command()
def many(
    output: Output = Path("sepme-eval"),
    seed: Seed = _SEED,
    pictures: Annotated[int, typer.Option(min=6, help="Of erased and of regular concepts, for each six.")] = 60,
    each: Annotated[int, typer.Option(min=1, help="Of each object, where half of all are erased.")] = 4,
    sixes: Annotated[int, typer.Option(min=1, help="Selections of six of each sort, from one bank of all.")] = 2,
    steps: Steps = 20,
) -> None:
    """Erase half of all objects at once, beside UCE; and any six of one bank of all objects and styles."""
    with _progress(5 + 3 * sixes) as advance:
        from sepme_diffusers.evaluation.baselines.registry import BASELINES
        from sepme_diffusers.evaluation.pictures import built_in
        from sepme_diffusers.evaluation.protocols import any_six, half_of_all
        from sepme_diffusers.evaluation.protocols.erasures import without_gates
        from sepme_diffusers.evaluation.report import bars_table

        pipe = built_in()
        half = half_of_all.HalfOfAllRunner(pipe, seed, each, steps)
        advance("making the increments of half of all objects", 0)
        bank = half.bank()
        advance("half of all objects: the original", 1)
        original = half.original()
        advance("half of all objects erased", 1)
        separate, restored = half.separate(bank), half.restored_change(bank, built_in())
        advance("half of all objects erased, without gates", 1)
        linear = half.separate(without_gates(bank), "separate increments, without gates")
        advance("half of all objects: UCE", 1)
        baseline, tries = half.baseline(BASELINES["UCE"], lambda name: advance(name, 0))
        advance("making one bank of all objects and styles", 1)
        whole, sixes_erased = any_six.AnySixRunner(pipe, seed, pictures, steps), []
        full = whole.bank()
        for selection in any_six.selections(seed, sixes):
            advance(", ".join(selection.names), 0)
            sixes_erased.append(whole.measure(full, selection))
            advance(selection.kind, 1)
        bars = [*half_of_all.half_bars(separate, baseline, restored), *any_six.six_bars(sixes_erased)]
        half_table = half_of_all.half_table((original, separate, linear, baseline), tries)
    six_table = any_six.six_table(full, sixes_erased)
    _finish(output, "many", "Many concepts", bars_table("Bars", bars), half_table, six_table)


@app.command()
def names(
    output: Output = Path("sepme-eval"),
    seed: Seed = _SEED,
    draws: Annotated[int, typer.Option(min=1, help="Of six styles and of six objects, at random.")] = 5,
    each: Annotated[int, typer.Option(min=1, help="Pictures of each concept, in each group.")] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help='"names", "two templates", "names, without gates" or, not by default, "names, then trained"; may be '
            "given several times."
        ),
    ] = None,
    steps: Steps = 20,
) -> None:
    """Erase what a user types: names drawn at random, or two templates for each, with nothing tuned."""
    with _progress(2 * draws * (len(only) if only else 3)) as advance:
        from sepme_diffusers.evaluation.pictures import built_in
        from sepme_diffusers.evaluation.protocols import names as protocol
        from sepme_diffusers.evaluation.report import bars_table

        _refuse_unknown(only, protocol.EVERY, "descriptions")
        runner = protocol.NamesRunner(built_in(), seed, each, steps)
        kinds: tuple[Kind, ...] = ("styles", "objects")
        results = []
        for draw in (draw for kind in kinds for draw in protocol.draws(kind, seed, draws)):
            for described in only or protocol.DESCRIBED:
                advance(f"{', '.join(draw.names)}: {described}", 0)
                results.append(runner.measure(draw, described))
                advance(described, 1)
        bars = bars_table("Bars, the worst draw", protocol.bars(results))
    _finish(output, "names", "What a user types", bars, protocol.table(results))


@app.command()
def restored(
    output: Output = Path("sepme-eval"),
    seed: Seed = _SEED,
    each: Annotated[int, typer.Option(min=1, help="Prompts of each concept.")] = 60,
    pictures: Annotated[int, typer.Option(min=1, help="Prompts that are drawn, of each bank.")] = 48,
    steps: Steps = 20,
) -> None:
    """Restore each concept of the shipped banks in turn, with all others erased, and read it in many wordings."""
    with _progress(2) as advance:
        from sepme_diffusers import pocket
        from sepme_diffusers.evaluation.pictures import built_in
        from sepme_diffusers.evaluation.protocols import restored as protocol
        from sepme_diffusers.evaluation.report import bars_table

        pipe, results = built_in(), []
        kinds: tuple[Kind, ...] = ("styles", "objects")
        for kind in kinds:
            advance(kind, 0)
            runner = protocol.RestoredRunner(pipe, kind, each, pictures, seed, steps)
            results.append(runner.measure(pocket.bank(kind)))
            advance(kind, 1)
    _finish(output, "restored", "Restored", protocol.table(results), bars_table("Bars", protocol.bars(results)))


@app.command()
def variants(
    output: Output = Path("sepme-eval"),
    seed: Seed = _SEED,
    only: Annotated[list[str] | None, typer.Option(help="One variant; may be given several times.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Of each style.")] = 24,
    steps: Steps = 20,
) -> None:
    """Compare every variant of the method and every baseline on the same two styles; and a bank on another UNet."""
    with _progress(len(only) if only else None) as advance:
        from sepme_diffusers.evaluation.pictures import built_in
        from sepme_diffusers.evaluation.protocols import variant_runner
        from sepme_diffusers.evaluation.protocols.variants import VARIANTS, VariantMaker, make
        from sepme_diffusers.evaluation.report import bars_table

        _refuse_unknown(only, VARIANTS, "variants")
        pipe = built_in()
        runner = variant_runner.VariantRunner(pipe, seed, pictures, steps)
        maker = VariantMaker(pipe, lambda step: advance(f"{step.concept}: step {step.step}", 0))
        rows = [runner.row("original", None)]
        for name in only or VARIANTS:
            advance(name, 0)
            rows.append(runner.row(name, *make(maker, name)))
            advance(name, 1)
            # It takes more than an hour: what an interrupted run has measured is not lost.
            _write(output, "variants", "Variants", variant_runner.table(rows), variant_runner.measures_table(rows))
        tables = [variant_runner.table(rows), variant_runner.measures_table(rows)]
        if not only:
            advance("the default on another UNet", 0)
            bank = cast("ConceptBank", VARIANTS["the default"](maker).product)
            transferred = variant_runner.transfer(pipe, bank, seed, 2 * pictures, steps)
            bars = bars_table("Bars", variant_runner.transfer_bars(transferred))
            tables += [variant_runner.transfer_table(transferred), bars]
            advance("the default on another UNet", 1)
    _finish(output, "variants", "Variants", *tables)


@app.command()
def ablations(
    output: Output = Path("sepme-eval"),
    seed: Seed = _SEED,
    only: Annotated[list[str] | None, typer.Option(help="One ablation; may be given several times.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Of each style.")] = 12,
    steps: Steps = 20,
) -> None:
    """Change one setting at a time: what that does to erased and regular pictures, and to the increments' size."""
    if find_spec("matplotlib") is None:
        raise typer.BadParameter("sepme eval ablations needs matplotlib: pip install 'sepme-diffusers[eval]'")
    with _progress(None) as advance:
        from sepme_diffusers.evaluation.pictures import built_in
        from sepme_diffusers.evaluation.protocols import ablations as protocol
        from sepme_diffusers.evaluation.protocols.variant_runner import VariantRunner

        _refuse_unknown(only, protocol.ABLATIONS, "ablations")
        pipe = built_in()
        runner = VariantRunner(pipe, seed, pictures, steps)
        ablator = protocol.Ablator(pipe, runner, lambda step: advance(f"{step.concept}: step {step.step}", 0))
        points = []
        for name in only or protocol.ABLATIONS:
            for value in protocol.ABLATIONS[name]:
                advance(f"{name} {value}", 0)
                points.append(ablator.measure(name, value))
                advance(name, 1)
                _write(output, "ablations", "Ablations", protocol.table(points), picture=protocol.plot(points))
    console.print(as_rich(protocol.table(points)))
    console.print(f"Wrote {output}", soft_wrap=True)


@app.command()
def paper(
    run: Annotated[Path, typer.Argument(help="JSON file of the run, see examples/paper.")],
    base: Annotated[str | None, typer.Option(help="Folder or Hub id. Default: the built-in model.")] = None,
    judge: Annotated[
        str, typer.Option(help='Tells what a picture shows: a CLIP model, or "pocket", the built-in judge.')
    ] = "pocket",
    output: Output = Path("sepme-eval"),
    seeds: Annotated[int | None, typer.Option(min=1, help="Of each concept. Default: as the file says.")] = None,
    pictures: Annotated[int | None, typer.Option(min=1, help="For each seed. Default: as the file says.")] = None,
    scene: Annotated[list[str] | None, typer.Option(help="One scene; may be given several times.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One more setting, tolerance=5e-5; may be given several times.")
    ] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Default: float16 on a GPU, float32 on the CPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps ... Default: the GPU, if there is one.")] = None,
) -> None:
    """Play the paper's scenes on any base, with the concepts, prompts, seeds and settings of a file."""
    with _progress(None, "the base model") as advance, refusals():
        from sepme_diffusers import pocket
        from sepme_diffusers.evaluation.preview.judges import find_judge
        from sepme_diffusers.evaluation.protocols import paper_runner
        from sepme_diffusers.evaluation.protocols.paper_run import PaperRun

        asked = PaperRun.load(run).changed(seeds, pictures, scene or (), set_ or ())
        cases, chosen = asked.cases(run.parent), find_judge(judge)
        pipe = load_base(base or str(pocket.path()), device, dtype)
        runner = paper_runner.PaperRunner(pipe, asked, cases, chosen, lambda doing: advance(doing, 0))
        tables = []
        for name in asked.scenes:
            tables.append(paper_runner.table(asked, name, runner.play(name)))
            advance(f"scene {name}", 1)
            _write(output, run.stem, asked.title, *tables, note=asked.note(base, chosen.name))
    for each in tables:
        console.print(as_rich(each))
    console.print(f"Wrote {output}", soft_wrap=True)


def _refuse_unknown(only: Iterable[str] | None, known: Iterable[str], what: str) -> None:
    """Check that what was asked for is there, before anything is measured."""
    if unknown := [name for name in only or () if name not in known]:
        raise typer.BadParameter(f"unknown {what} {unknown}; there are {list(known)}")


def _page(title: str, *tables: Table) -> str:
    from sepme_diffusers.evaluation import report

    return report.markdown(title, _NOTE, tables)


def _chosen(only: list[str]) -> dict[Kind, list[str]]:
    """Read names of kinds and scenes as {kind: scenes}."""
    from sepme_diffusers.evaluation.protocols.scene_list import SCENES

    kinds: tuple[Kind, ...] = ("styles", "objects")
    all_scenes = {f"{kind}-{number}": (kind, number) for kind in kinds for number in SCENES}
    wanted = [name for name in all_scenes if not only or name in only or all_scenes[name][0] in only]
    if unknown := set(only) - set(all_scenes) - {"styles", "objects"}:
        raise typer.BadParameter(
            f"unknown scenes {sorted(unknown)}; there are styles, objects, {', '.join(all_scenes)}"
        )
    chosen: dict[Kind, list[str]] = {}
    for kind, number in (all_scenes[name] for name in wanted):
        chosen.setdefault(kind, []).append(number)
    return chosen


@contextmanager
def _progress(total: int | None, loading: str = "the built-in model") -> Iterator[Callable[[str, int], None]]:
    """Show progress while the block runs. It calls what this gives with what is done now, and the parts just finished.

    Args:
        total: Parts of the work, if that is known.
        loading: What is loaded first.
    """
    if find_spec("torchmetrics") is None:
        raise typer.BadParameter("sepme eval needs torchmetrics: pip install 'sepme-diffusers[eval]'")
    announce_loading(loading)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=total)
        yield lambda doing, finished: progress.update(task, description=doing, advance=finished)


def _finish(output: Path, name: str, title: str, *tables: Table) -> None:
    """Print the tables, and write them as the last page."""
    for table in tables:
        console.print(as_rich(table))
    _write(output, name, title, *tables)
    console.print(f"Wrote {output}", soft_wrap=True)


def _write(
    output: Path, name: str, title: str, *tables: Table, picture: Image.Image | None = None, note: str = _NOTE
) -> None:
    """Write tables as a page that begins with a note, as plain values, and with the page's picture if it has one."""
    from sepme_diffusers.evaluation import report

    rows = {table.title: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in tables}
    page = report.markdown(title, note, tables, "" if picture is None else f"{name}.png")
    report.save(output, name, page, rows, picture)
