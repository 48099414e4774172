"""`sepme erase`, `sepme capacity` and `sepme soft-guards`: make erasures, or ask what they would cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table as RichTable

from sepme_diffusers.cli.console import announce_loading, console, refusals

if TYPE_CHECKING:
    from sepme_diffusers.bank.bank import ConceptBank
    from sepme_diffusers.making.trainer import SepMETrainer
    from sepme_diffusers.text.concept import Concept

Base = Annotated[str, typer.Argument(help="Folder or Hub id of the base model.")]
Styles = Annotated[list[str] | None, typer.Option("--style", help="A style to erase; one option per concept.")]
Objects = Annotated[list[str] | None, typer.Option("--object", help="An object to erase.")]
People = Annotated[list[str] | None, typer.Option("--person", help="A person to erase.")]
Contents = Annotated[list[str] | None, typer.Option("--content", help='Such as "nudity" or "violence".')]
Names = Annotated[
    list[str] | None, typer.Option("--concept", help="The name of what --template or --kind tells the prompts of.")
]
KindOf = Annotated[str | None, typer.Option("--kind", help="Of --concept: a kind's name, or a JSON file like theirs.")]
Templates = Annotated[
    list[str] | None, typer.Option("--template", help='A prompt that shows it, with "{concept}" for its name.')
]
Withouts = Annotated[list[str] | None, typer.Option("--without", help="The same prompt without it; one per template.")]
Anchors = Annotated[list[str] | None, typer.Option("--anchor", help="What takes its place: a phrase, a hypernym.")]
File = Annotated[
    Path | None,
    typer.Option(
        "--concepts",
        help='JSON: a list of {"name", "kind", "aliases"}, {"name", "template", "without", "anchor"} or '
        '{"name", "pairs"}.',
    ),
]
Hard = Annotated[list[str] | None, typer.Option("--guard", help="A prompt that must stay exactly as it is.")]
RegularPrompts = Annotated[
    str | None,
    typer.Option(
        "--regular",
        help="Regular prompts: a text file with one per line, what `sepme soft-guards` wrote, or how many of those "
        "that come with the package. Default: as many of these as are encoded in ten minutes.",
    ),
]
Settings = Annotated[Path | None, typer.Option("--config", help="JSON: fields of SepMEConfig.")]
Solver = Annotated[str | None, typer.Option(help="train, closed_form or closed_form+train.")]
Add = Annotated[str | None, typer.Option(help="A bank, folder or Hub id, that the concepts join.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps ...")]


def erase(
    base: Base,
    output: Annotated[Path, typer.Argument(help="Folder for the bank; a bank that is there is added to.")],
    style: Styles = None,
    object: Objects = None,
    person: People = None,
    content: Contents = None,
    concept: Names = None,
    kind: KindOf = None,
    template: Templates = None,
    without: Withouts = None,
    anchor: Anchors = None,
    concepts: File = None,
    guard: Hard = None,
    regular: RegularPrompts = None,
    solver: Solver = None,
    config: Settings = None,
    add: Add = None,
    state: Annotated[Path | None, typer.Option(help="Folder to resume an interrupted training from.")] = None,
    device: Device = "cpu",
    license: Annotated[str | None, typer.Option(help="Of the bank, for its card.")] = None,
    adapters: Annotated[
        bool | None,
        typer.Option(help="A PEFT LoRA beside each increment, for other tools. Default: up to 200 concepts."),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Exit with 1 if an erasure reaches too little or moves too much.")
    ] = False,
) -> None:
    """Make erasures and write them into a bank. `accelerate launch -m sepme_diffusers.cli` shares them out."""
    from accelerate import PartialState

    with refusals():
        named = {"style": style, "object": object, "person": person, "content": content, kind: concept}
        wanted = _concepts(named, template, without, anchor, concepts)
        trainer = _trainer(base, guard, regular, solver, config, state, device)
        bank = trainer.erase(wanted, _bank(add or output))
        if PartialState().is_main_process:
            bank.save_pretrained(output, license=license, adapters=adapters)
            console.print(_increments_table(bank, [concept.name for concept in wanted]))
            console.print(f"Wrote {output}", soft_wrap=True)
    if strict and (doubtful := [each.name for each in wanted if bank[each.name].doubts]):
        console.print(f"Not as it should be: {', '.join(doubtful)} (see above)", style="red", markup=False)
        raise typer.Exit(1)


def capacity(
    base: Base,
    style: Styles = None,
    object: Objects = None,
    person: People = None,
    content: Contents = None,
    concept: Names = None,
    kind: KindOf = None,
    template: Templates = None,
    without: Withouts = None,
    anchor: Anchors = None,
    concepts: File = None,
    guard: Hard = None,
    regular: RegularPrompts = None,
    config: Settings = None,
    add: Add = None,
    device: Device = "cpu",
) -> None:
    """Tell how much room there is for erasures, and what one more would cost, before anything is made."""
    with refusals():
        named = {"style": style, "object": object, "person": person, "content": content, kind: concept}
        wanted = _concepts(named, template, without, anchor, concepts)
        capacities = _trainer(base, guard, regular, None, config, None, device).capacity(wanted, _bank(add))
    table = RichTable(title=f"Of {next(iter(capacities.values())).dimensions} dimensions")
    for column in ("concept", "left for it", "its name takes", "names guarded exactly", "reach", "leakage"):
        table.add_column(column)
    for name, room in capacities.items():
        cells = (room.dimensions_left, room.dimensions_taken, f"{room.names_exact} of {room.names}")
        table.add_row(name, *map(str, cells), f"{room.reach:.2f}", f"{room.leakage:.1e}")
    console.print(table)


def soft_guards(
    base: Base,
    prompts: Annotated[Path, typer.Argument(help="Text file of regular prompts, one per line.")],
    output: Annotated[Path, typer.Argument(help="What to write: a .safetensors file.")],
    device: Device = "cpu",
) -> None:
    """Make a small file of regular prompts that erasures should change little."""
    from sepme_diffusers.making.soft_guards import SoftGuards

    with refusals():
        guards = SoftGuards.from_file(_pipeline(base, device), prompts)
        guards.save(output)
    console.print(
        f"Wrote {output}: {len(guards.prompts)} prompts, {output.stat().st_size / 1e3:.0f} KB", soft_wrap=True
    )


def _pipeline(base: str, device: str) -> Any:
    announce_loading("the base model")
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(base).to(device)


def _concepts(
    named: Mapping[str | None, list[str] | None],
    templates: list[str] | None,
    withouts: list[str] | None,
    anchors: list[str] | None,
    file: Path | None,
) -> list[Concept]:
    """Make the concepts that options and a file describe; `named` holds names by kind, None for those of templates."""
    from sepme_diffusers.text.concept import Concept, as_concepts

    def described(name: str, kind: str | None) -> Concept | str:
        if kind is None and templates:
            return Concept.from_template(name, templates, withouts or [], anchors or None)
        return name if kind is None else Concept(name, kind=kind)

    concepts = [described(name, kind) for kind, names in named.items() for name in names or ()]
    for values in json.loads(file.read_text(encoding="utf-8")) if file is not None else ():
        concepts.append(Concept.from_template(**values) if "template" in values else Concept.from_dict(values))
    return as_concepts(concepts)


def _trainer(
    base: str,
    guards: list[str] | None,
    regular: str | None,
    solver: str | None,
    settings: Path | None,
    state: Path | None,
    device: str,
) -> SepMETrainer:
    from sepme_diffusers.increment.config import SepMEConfig
    from sepme_diffusers.making.soft_guards import SoftGuards
    from sepme_diffusers.making.trainer import SepMETrainer

    values = json.loads(settings.read_text(encoding="utf-8")) if settings is not None else {}
    config = SepMEConfig.from_dict(values | ({"solver": solver} if solver else {}))
    pipe = _pipeline(base, device)
    prompts: SoftGuards | int | None = None
    if regular is not None and regular.isdecimal():
        prompts = int(regular)
    elif regular is not None:
        of_file = SoftGuards.load if regular.endswith(".safetensors") else partial(SoftGuards.from_file, pipe)
        prompts = of_file(regular)
    return SepMETrainer(pipe, config, guards or (), prompts, state=state)


def _bank(where: str | Path | None) -> ConceptBank | None:
    from sepme_diffusers.bank.bank import ConceptBank
    from sepme_diffusers.bank.disk.layout import MANIFEST

    if where is None or (isinstance(where, Path) and not (where / MANIFEST).exists()):
        return None
    return ConceptBank.from_pretrained(where)


def _increments_table(bank: ConceptBank, names: list[str]) -> RichTable:
    """Tabulate what was made: what each erasure reaches, what it moves, and what is kept beside it."""
    table = RichTable(title="New increments")
    for column in ("concept", "kind", "form", "gate", "own reached", "regular moved", "becomes", "nearest kept"):
        table.add_column(column)
    for name in names:
        entry = bank[name]
        said, gate = entry.metrics, entry.increment.gate
        reached = f"{said['own_reached']:.0%}" if "own_reached" in said else ""
        moved = ""
        if "regular_moved" in said:
            moved = f"{said['regular_moved']:.1%} of {said['regular_prompts']} (< {said['regular_bound']:.1%})"
        table.add_row(
            name, entry.concept.kind or "", f"{entry.form}, rank {entry.increment.rank}",
            "none" if gate is None else f"{gate:.2f}", reached, moved,
            said.get("anchor", "without" if entry.concept.kind else ""), ", ".join(said.get("nearest", ())[:3]),
        )  # fmt: skip
    return table
