"""`sepme sign`, `sepme verify` and `sepme pack`: whether a bank can be trusted, and how it lies on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table as RichTable

from sepme_diffusers.cli.console import console, harmless, quieten, refusals


def sign(
    bank: Annotated[Path, typer.Argument(help="Folder of the bank.")],
    key: Annotated[Path, typer.Option(help="Private key: PEM file, elliptic curve.")],
    password: Annotated[str | None, typer.Option(envvar="SEPME_KEY_PASSWORD", help="Of the key.")] = None,
) -> None:
    """Sign a bank, so that load_sepme(..., require_signature=PUBLIC_KEY) accepts it. Needs sepme-diffusers[sign]."""
    from sepme_diffusers.bank.disk import signing

    try:
        signature = signing.sign(bank, key, password)
    except (ImportError, OSError, TypeError, ValueError) as error:
        console.print(f"Not signed: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    console.print(f"Wrote {signature}", soft_wrap=True)


def pack(
    bank: Annotated[Path, typer.Argument(help="Folder of a concept bank.", exists=True, file_okay=False)],
) -> None:
    """Write a bank's shards anew: few, and without the rows of increments that are gone. A signature becomes void."""
    from sepme_diffusers.bank.bank import ConceptBank

    with refusals():
        ConceptBank.from_pretrained(bank).save_pretrained(bank, pack=True)
    console.print(f"Wrote {bank}", soft_wrap=True)


def verify(
    bank: Annotated[Path, typer.Argument(help="Folder of a concept bank.", exists=True, file_okay=False)],
    base: Annotated[
        Path | None,
        typer.Option(help="Folder of its base model: also check the guards.", exists=True, file_okay=False),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Measure guards of so many concepts, chosen at random.")
    ] = None,
) -> None:
    """Check a bank's files, increments and guards, and list everything that is wrong; exit status 1 if anything is."""
    quieten()
    from diffusers import DiffusionPipeline

    from sepme_diffusers.bank.checks.verify import verify as check

    pipe = None if base is None else DiffusionPipeline.from_pretrained(base, use_safetensors=True)
    report = check(bank, pipe, sample)
    table = RichTable(title=escape(str(bank)))
    for column in ("concept", "form", "rank", "norm", "leakage", "verdict"):
        table.add_column(column)
    table.add_row("(bank)", "", "", "", "", _verdict(report.folder))
    for name, concept in report.concepts.items():
        figures = ("" if value is None else f"{value:.3g}" for value in (concept.rank, concept.norm, concept.leakage))
        table.add_row(escape(name), concept.form or "", *figures, _verdict(concept.faults))
    console.print(table)
    for note in report.notes:
        console.print(f"Note: {note}")
    console.print(f"{len(report.faults)} faults" if report.faults else "No faults")
    raise typer.Exit(not report.ok)


def _verdict(faults: tuple[str, ...]) -> str:
    return "\n".join(map(harmless, faults)) or "ok"
