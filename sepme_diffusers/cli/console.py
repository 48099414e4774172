"""The terminal: one console, other libraries quiet, tables as rich draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
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


def as_rich(table: Table) -> RichTable:
    """A report's table for the terminal."""
    shown = RichTable(title=table.title)
    for column in table.columns:
        shown.add_column(column, justify="left" if column == table.columns[0] else "right")
    for row in table.rows:
        shown.add_row(*row)
    return shown
