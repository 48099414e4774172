"""A contact sheet: many pictures in one, in rows and columns with labels; and how pictures are encoded."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP, _LABEL = 4, 190
_FONT, _LINE, _LETTER = 12, 15, 6.2  # pixels: the font's size, what a line takes, a letter of middling width
_INK, _PAPER = (30, 30, 34), (255, 255, 255)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str] = (),
    headers: Sequence[str] = (),
    scale: int = 1,
) -> Image.Image:
    """Lay out pictures in rows and columns, with a label before each row and a header over each column where given.

    Args:
        rows: Pictures of one size.
        labels: One per row; lines that are too long are wrapped.
        headers: One per column, wrapped too.
        scale: How many pixels of the sheet, in each direction, a pixel of a picture takes.
    """
    width, height = (side * scale for side in rows[0][0].size)
    headers = [_wrapped(header, width) for header in headers]
    left, top = (_LABEL if labels else 0), max((_height(header) + 8 for header in headers), default=0)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (width + _GAP), top + len(rows) * (height + _GAP)), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for column, header in enumerate(headers):
        pen.multiline_text((left + column * (width + _GAP), 3), header, fill=_INK, font=font)
    for index, row in enumerate(rows):
        y = top + index * (height + _GAP)
        if labels:
            label = _wrapped(labels[index], _LABEL - 4)
            pen.multiline_text((2, y + max(0, height - _height(label)) // 2), label, fill=_INK, font=font)
        for column, picture in enumerate(row):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + column * (width + _GAP), y))
    return sheet


def as_png(picture: Image.Image) -> bytes:
    """Encode a picture as the content of a PNG file."""
    return _encoded(picture, "PNG")


def as_data_uri(picture: Image.Image, most: int) -> str:
    """Encode a picture as the address of an image in a page: as it is, or smaller, as a JPEG.

    Args:
        picture: The picture.
        most: Pixels of the longer side, above which it is made smaller.
    """
    if max(picture.size) <= most:
        return f"data:image/png;base64,{base64.b64encode(as_png(picture)).decode()}"
    smaller = picture.convert("RGB")
    smaller.thumbnail((most, most), Image.Resampling.LANCZOS)
    return f"data:image/jpeg;base64,{base64.b64encode(_encoded(smaller, 'JPEG', quality=88)).decode()}"


def _encoded(picture: Image.Image, format: str, **options: int) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def _wrapped(text: str, pixels: int) -> str:
    letters = max(8, int(pixels / _LETTER))
    return "\n".join(textwrap.fill(line, letters) for line in text.split("\n"))


def _height(text: str) -> int:
    return _LINE * (text.count("\n") + 1)
