"""The terminal: one console, other libraries quiet, tables as rich draws them, errors as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from sepme_diffusers.evaluation.report import Table

console = Console()


def quieten() -> None:
    """Leave the terminal to our own progress: no loading bars, no hints about optional packages."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def announce_loading(what: str) -> None:
    """Print at once what takes the first seconds, and quieten the libraries."""
    console.print(f"Loading torch and {what} ...")
    quieten()


@contextmanager
def refusals() -> Iterator[None]:
    """Turn errors that the user can mend into one sentence and exit status 2."""
    try:
        yield
    except (OSError, TypeError, ValueError, FloatingPointError) as error:
        raise typer.BadParameter(str(error)) from error


def harmless(text: str) -> str:
    """Show a text that others wrote as it is: it is no markup, and no command to a terminal."""
    return escape("".join(c if c.isprintable() else "?" for c in text))


def as_rich(table: Table) -> RichTable:
    """Draw a report's table for the terminal."""
    drawn = RichTable(title=table.title)
    for column in table.columns:
        drawn.add_column(column, justify="left" if column == table.columns[0] else "right")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn
