"""The report of a preview: a page that needs no other file, and one picture with all rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import resources

from jinja2 import Environment
from PIL import Image, ImageOps

from sepme_diffusers.evaluation.preview.outcome import MOMENTS, Preview, Row, Sheet
from sepme_diffusers.runtime.contact_sheet import as_data_uri, contact_sheet

_TEMPLATE = resources.files("sepme_diffusers.evaluation.preview") / "page.html.jinja"
# Pixels of the sides of a picture: the least in the grid, where small ones are enlarged, and the most.
_LEAST, _MOST = 128, 192
# The most on the page.
_PAGE_MOST = 320
_PAPER, _GREEN, _RED = "white", "#1a7f37", "#cf222e"
_FRAME = 3
_COLUMNS = ("concept", "own prompts changed", "neighbours moved", "regular moved", "restored equal")
SORTS = {"own": "own prompt", "alias": "second name", "neighbour": "neighbour", "regular": "regular prompt"}


def page(preview: Preview, base: str) -> str:
    """Write the page.

    Args:
        preview: What was found.
        base: What the model is called.
    """
    template = Environment(autoescape=True).from_string(_TEMPLATE.read_text("utf-8"))
    return template.render(
        title="What erasing does",
        preview=preview,
        base=base,
        sorts=SORTS,
        columns=columns(preview),
        summary=summary,
        judged=judged,
        figures=lambda row: list(_figures(row)),
        tiny=lambda row: max(row.pictures[0].size) <= _LEAST,
        blank=sum(row.blank for sheet in preview.sheets for row in sheet.rows),
    )


def columns(preview: Preview) -> tuple[str, ...]:
    """Name the columns of a table of sheets: the concept, `summary`, and what the judge says if there is one."""
    return (*_COLUMNS, *(("shows it, before → erased",) if preview.judge else ()))


def summary(sheet: Sheet) -> list[tuple[str, bool]]:
    """Sum up a sheet, and say whether each figure is good.

    It counts own prompts that changed, neighbours that moved, regular prompts that moved, and equal restored pictures.
    """
    (own, all_own), (near, all_near) = sheet.moved("own", "alias"), sheet.moved("neighbour")
    (regular, all_regular), (restored, all_restored) = sheet.moved("regular"), sheet.restored
    return [
        (f"{own} of {all_own}", own == all_own),
        (f"{near} of {all_near}", near == 0),
        (f"{regular} of {all_regular}", regular == 0),
        (f"{restored} of {all_restored}", restored == all_restored),
    ]


def judged(sheet: Sheet) -> str:
    """Say what the judge sees of a concept's own prompts, original and erased."""
    return "" if sheet.judged is None else "{:.2f} → {:.2f}".format(*sheet.judged)


def grid(preview: Preview) -> Image.Image:
    """Lay out all rows in one picture; each picture has a green frame if it is as it should be, or a red one."""
    rows, labels = [], []
    for sheet in preview.sheets:
        for row in sheet.rows:
            good = (None, row.as_wanted, row.restored.none)
            rows.append([_framed(picture, mark) for picture, mark in zip(row.pictures, good, strict=True)])
            labels.append(
                f"{sheet.concept}: {SORTS[row.asked.sort]}\n{row.asked.prompt}\n"
                f"erased: {row.erased}\nrestored: {row.restored}"
            )
    return contact_sheet(rows, labels, MOMENTS)


def _figures(row: Row) -> Iterator[dict[str, str]]:
    said = ("", str(row.erased), str(row.restored))
    good = (True, row.as_wanted, row.restored.none)
    for index, moment in enumerate(MOMENTS):
        yield {
            "moment": moment,
            "source": as_data_uri(row.pictures[index], _PAGE_MOST),
            "said": said[index],
            "mark": "good" if good[index] else "bad",
            "score": _shown(row.scores[index]) if row.scores else "",
        }


def _shown(score: float) -> str:
    return "–" if math.isnan(score) else f"{score:.2f}"


def _framed(picture: Image.Image, good: bool | None) -> Image.Image:
    """Bring a picture to the size that the grid has room for, and frame it."""
    scale = max(1, -(-_LEAST // max(picture.size)))
    shown = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    shown.thumbnail((_MOST, _MOST), Image.Resampling.LANCZOS)
    return ImageOps.expand(shown, _FRAME, _PAPER if good is None else _GREEN if good else _RED)
