"""Which icon of the Iconify sets shows which object of the built-in model."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import resvg_py
from PIL import Image

from sepme_diffusers.pocket.vocabulary import OBJECTS

# Objects whose icon is named otherwise.
_ICON = {
    "cat": "cat-face", "dog": "dog-face", "tiger": "tiger-face", "pig": "pig-face", "monkey": "monkey-face",
    "rabbit": "rabbit-face", "cow": "cow-face", "chick": "front-facing-baby-chick", "whale": "spouting-whale",
    "bee": "honeybee", "ladybug": "lady-beetle", "dinosaur": "sauropod", "apple": "red-apple",
    "cherry": "cherries", "corn": "ear-of-corn", "burger": "hamburger", "fries": "french-fries",
    "donut": "doughnut", "cake": "birthday-cake", "coffee": "hot-beverage", "beer": "beer-mug",
    "cocktail": "cocktail-glass", "pine": "evergreen-tree", "palm": "palm-tree", "clover": "four-leaf-clover",
    "maple": "maple-leaf", "moon": "crescent-moon", "lightning": "high-voltage", "car": "automobile",
    "bulb": "light-bulb", "lock": "locked", "gem": "gem-stone", "gift": "wrapped-gift", "heart": "red-heart",
    "pumpkin": "jack-o-lantern",
}  # fmt: skip
ICONS = {name: _ICON.get(name, name) for name in OBJECTS}


@cache
def icon_set(folder: Path) -> dict:
    """The parsed icons.json of one fetched icon set."""
    return json.loads((folder / "icons.json").read_text())


def rasterise(folder: Path, object_: str, size: int = 320) -> Image.Image:
    """The icon of an object as an RGBA picture of `size` pixels."""
    icons, name = icon_set(folder), ICONS[object_]
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = icon["body"].replace("currentColor", "#000000")
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {namespaces} viewBox="0 0 {width} {height}">{body}</svg>'
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)))).convert(
        "RGBA"
    )
