"""`sepme explain`: why a prompt is changed by a bank, or not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table as RichTable

from sepme_diffusers.cli.console import announce_loading, console, harmless, quieten, refusals

if TYPE_CHECKING:
    from sepme_diffusers.runtime.explanation import Explanation, PromptReading


def explain(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base model.")],
    bank: Annotated[str, typer.Argument(help="Folder or Hub id of the bank.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to explain, one or several.")],
    concept: Annotated[
        list[str] | None, typer.Option(help="Look at this concept; one option per concept. Default: at all.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most concepts that are listed for each prompt.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps ...")] = "cpu",
) -> None:
    """Tell which concepts of a bank act on a prompt if they are erased, and why. Nothing is drawn.

    A concept acts if its increment reads at least as much of the prompt as its gate says, or if the prompt spells one
    of its names. Those that act come first, then those that come near. What the bank's policy always erases counts as
    erased.
    """
    if as_json:
        quieten()
    else:
        announce_loading("the base model")
    with refusals():
        explanation = _explained(base, bank, prompts, concept, limit, device)
    if as_json:
        typer.echo(json.dumps(explanation.to_dict(), indent=1, ensure_ascii=False))
        return
    for reading in explanation.prompts:
        _show(reading)


def _explained(
    base: str, bank: str, prompts: list[str], concepts: list[str] | None, limit: int, device: str
) -> Explanation:
    from diffusers import DiffusionPipeline

    from sepme_diffusers.runtime.pipeline import attach

    pipe = attach(DiffusionPipeline.from_pretrained(base).to(device))
    pipe.load_sepme(bank)
    return pipe.explain(prompts, concepts, limit)


def _show(reading: PromptReading) -> None:
    head, *body = reading.lines()
    console.print(f"\n{harmless(reading.sentence)}", soft_wrap=True)
    if body:
        table = RichTable(*head)
        for line in body:
            table.add_row(*map(harmless, line))
        console.print(table)
    if reading.rest:
        console.print(reading.rest)
