"""Tables and bars; Markdown with JSON, and a self-contained HTML report."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL import Image

from sepme_diffusers.bank.disk.files import replace_file
from sepme_diffusers.runtime.contact_sheet import as_png


@dataclass(frozen=True)
class Table:
    """A table of a report: its title, its column names, and rows of cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Bar:
    """A bar: what is measured, what it must be, what it was, and whether that is met."""

    measure: str
    bar: str
    measured: str
    met: bool


def bars_table(title: str, bars: Sequence[Bar]) -> Table:
    """Tabulate bars."""
    rows = tuple((bar.measure, bar.bar, bar.measured, "yes" if bar.met else "no") for bar in bars)
    return Table(title, ("measure", "bar", "measured", "met"), rows)


def markdown(title: str, summary: str, tables: Sequence[Table], picture: str = "") -> str:
    """Write a page of Markdown, with the picture of that file name at its end."""
    parts = [f"# {title}", summary]
    for table in tables:
        lines = [table.columns, ("---",) * len(table.columns), *table.rows]
        parts += [f"## {table.title}", "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)]
    if picture:
        parts.append(f"![{title}]({picture})")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1e1e22 }
 img { max-width: 100%; image-rendering: pixelated }
 table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd }
 th { text-align: left } td:not(:first-child) { font-variant-numeric: tabular-nums }
 figcaption, footer { color: #55555c }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
{% for table in tables %}<h2>{{ table.title }}</h2>
<table><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}<figure><img alt="{{ caption }}" src="data:image/png;base64,{{ picture }}">
<figcaption>{{ caption }}</figcaption></figure>
<footer>{{ footer }}</footer>
</body></html>
"""


def html_page(
    title: str, summary: str, tables: Sequence[Table], picture: Image.Image, caption: str, footer: str
) -> str:
    """Write a page that needs no other file."""
    encoded = base64.b64encode(as_png(picture)).decode()
    page = Environment(autoescape=True).from_string(_PAGE)
    return page.render(title=title, summary=summary, tables=tables, picture=encoded, caption=caption, footer=footer)


def save(folder: Path, name: str, page: str, data: Any, picture: Image.Image | None = None) -> None:
    """Write name.md, name.json and name.png into a folder, which is made if missing. Each file appears complete."""
    files = {f"{name}.md": page.encode(), f"{name}.json": json.dumps(data, indent=1, ensure_ascii=False).encode()}
    if picture is not None:
        files[f"{name}.png"] = as_png(picture)
    _write(folder, files)


def write(folder: Path, picture: Image.Image, page: str) -> None:
    """Write grid.png and report.html into a folder, which is made if missing. Each file appears complete."""
    _write(folder, {"grid.png": as_png(picture), "report.html": page.encode()})


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace_file(folder / name, content)
