"""The command line's entry: the commands, each in a file of its own kind.

Heavy imports wait until a command runs, so that output starts at once.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from sepme_diffusers.cli import banks, bench, demo, evaluation, explaining, export, making, preview

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Separable concept erasure for diffusers.")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sepme-diffusers {version('sepme-diffusers')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Separable concept erasure for diffusers."""


app.command()(demo.demo)
app.command()(making.erase)
app.command()(making.capacity)
app.command("soft-guards")(making.soft_guards)
app.command()(preview.preview)
app.command()(export.export)
app.command()(explaining.explain)
app.command()(banks.sign)
app.command()(banks.verify)
app.command()(banks.pack)
app.command()(bench.bench)
app.add_typer(evaluation.app, name="eval")


if __name__ == "__main__":
    app()
