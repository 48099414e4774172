"""The styles: what turns a piece of emoji art (RGBA, 256 x 256) into a 64 x 64 picture in one technique.

A technique is what an artist's style is: one transformation over every content. `stencil` is a hand instead: art
that its authors drew that way. `plain` is the colour art as it is, what a prompt without a style gives.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage import color, filters

from sepme_diffusers.pocket.vocabulary import PLAIN

SIZE, OUT = 256, 64
Array = np.ndarray


def _paper(art: Image.Image, background: tuple[float, ...]) -> Array:
    """The art on a plain background, as floats (256, 256, 3) in [0, 1]."""
    rgba = np.asarray(art, dtype=np.float32) / 255
    return rgba[..., :3] * rgba[..., 3:] + np.float32(background) * (1 - rgba[..., 3:])


def _alpha(art: Image.Image) -> Array:
    return np.asarray(art, dtype=np.float32)[..., 3] / 255


def _shade(art: Image.Image) -> Array:
    """Luminance inside the art, stretched to [0, 1]; 1 (paper) outside."""
    grey, inside = color.rgb2gray(_paper(art, (1, 1, 1))), _alpha(art) > 0.5
    if inside.any():
        low, high = np.quantile(grey[inside], [0.02, 0.98])
        grey = np.clip((grey - low) / max(high - low, 0.15), 0, 1) * 0.85
    return np.where(inside, grey, 1.0).astype(np.float32)


def _lines(art: Image.Image, sigma: float = 2.0, gain: float = 3.5) -> Array:
    """Contours of the art, strength in [0, 1]."""
    picture = np.concatenate([_paper(art, (1, 1, 1)), _alpha(art)[..., None]], axis=-1)
    edges = sum(filters.sobel(ndimage.gaussian_filter(picture[..., channel], sigma)) for channel in range(4))
    return np.clip(edges * gain * sigma, 0, 1).astype(np.float32)


def _mix(ink: Array, under: Array | tuple, over: Array | tuple) -> Array:
    """`over` where ink is 1, `under` where it is 0."""
    return np.float32(under) * (1 - ink[..., None]) + np.float32(over) * ink[..., None]


def _grain(rng: np.random.Generator, sigma: float) -> Array:
    noise = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)).astype(np.float32), sigma)
    return noise / noise.std()


def _grid() -> tuple[Array, Array]:
    return np.mgrid[:SIZE, :SIZE].astype(np.float32)


def _reduce(picture: Array) -> Image.Image:
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    return image.resize((OUT, OUT), Image.Resampling.BOX)


def hand(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The art as it is, on white."""
    return _reduce(_paper(art, (1, 1, 1)))


def pixel(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """16 x 16 blocks in few colours, on lilac."""
    small = Image.fromarray((_paper(art, (0.86, 0.84, 0.97)) * 255).astype(np.uint8)).resize(
        (16, 16), Image.Resampling.BOX
    )
    levels = (np.asarray(small, dtype=np.float32) / 51).round() * 51
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).resize((OUT, OUT), Image.Resampling.NEAREST)


def pencil(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Grey contours and slanted hatching on white paper."""
    y, x = _grid()
    strokes = 0.5 + 0.5 * np.sin((x + y) / 2.6 + 0.7 * _grain(rng, 6))
    hatching = np.clip((0.8 - _shade(art)) * 0.8, 0, 1) * strokes
    ink = np.clip(_lines(art, 1.5, 4) * 0.85 + hatching, 0, 1) * np.clip(0.85 + 0.15 * _grain(rng, 1), 0, 1)
    return _reduce(_mix(ink, (0.97, 0.97, 0.96), (0.25, 0.25, 0.28)))


def woodcut(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Black blocks cut by horizontal lines, on cream."""
    y, _ = _grid()
    wave = 0.5 + 0.5 * np.sin((y + 3 * _grain(rng, 12)) * 2 * np.pi / 18)
    cut = ndimage.gaussian_filter(_shade(art), 2) > wave * 0.75 + 0.12
    ink = np.maximum((_alpha(art) > 0.5) & ~cut, _lines(art, 2.5, 4) > 0.5).astype(np.float32)
    return _reduce(_mix(ink, (0.93, 0.85, 0.68), (0.12, 0.08, 0.06)))


def blueprint(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """White contours on blue with a fine grid."""
    y, x = _grid()
    paper = np.where(((x % 32) < 3) | ((y % 32) < 3), 0.12, 0.0)
    ink = np.clip(_lines(art, 2, 4) + paper + 0.18 * _alpha(art) * _shade(art), 0, 1)
    return _reduce(_mix(ink, (0.08, 0.27, 0.63), (0.94, 0.97, 1.0)))


def halftone(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Crimson dots whose size follows the shade, on pale yellow."""
    y, x = _grid()
    u, v = (x + y) / np.sqrt(2), (x - y) / np.sqrt(2)
    screen = 0.5 + 0.25 * (np.cos(u * 2 * np.pi / 16) + np.cos(v * 2 * np.pi / 16))
    dark = np.where(_alpha(art) > 0.5, np.clip(1.05 - ndimage.gaussian_filter(_shade(art), 2), 0.1, 0.95), 0)
    ink = np.clip((dark - (1 - screen)) * 8 + 0.5, 0, 1) * (dark > 0)
    ink = np.maximum(ink, 0.8 * _lines(art, 2, 3))
    return _reduce(_mix(ink, (1.0, 0.95, 0.72), (0.82, 0.06, 0.27)))


def neon(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Glowing contours in the art's own hues, on near black."""
    hsv = color.rgb2hsv(ndimage.gaussian_filter(_paper(art, (1, 1, 1)), (3, 3, 0)))
    hue = np.where(hsv[..., 1] > 0.12, hsv[..., 0], 0.52)
    tube = color.hsv2rgb(np.stack([hue, np.full_like(hue, 0.75), np.ones_like(hue)], axis=-1)).astype(np.float32)
    lines = _lines(art, 2, 4)
    glow = ndimage.gaussian_filter(tube * lines[..., None], (9, 9, 0)) * 1.6
    return _reduce(np.float32((0.04, 0.02, 0.09)) + tube * lines[..., None] + 0.3 * lines[..., None] ** 3 + glow)


def watercolour(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Pale washes with wobbling, darker rims on textured paper."""
    y, x = _grid()
    wobble = [y + 3.5 * _grain(rng, 9), x + 3.5 * _grain(rng, 9)]
    warp = [ndimage.map_coordinates(channel, wobble, order=1, mode="nearest") for channel in
            (*np.moveaxis(_paper(art, (1, 1, 1)), -1, 0), _alpha(art))]  # fmt: skip
    wash, inside = np.stack(warp[:3], axis=-1), warp[3]
    wash = ndimage.median_filter(wash[::4, ::4], size=(3, 3, 1)).repeat(4, 0).repeat(4, 1)
    wash = ndimage.gaussian_filter(wash, (2, 2, 0))
    rim = np.clip(inside - ndimage.gaussian_filter(inside, 7), 0, 1) * 0.9
    paint = wash * 0.62 + 0.36 - rim[..., None] * 0.35 + 0.05 * _grain(rng, 7)[..., None]
    paper = np.float32((0.985, 0.96, 0.90)) + 0.012 * _grain(rng, 2)[..., None]
    return _reduce(_mix(ndimage.gaussian_filter(inside, 2.5), paper, np.clip(paint, 0, 1)))


def mosaic(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Saturated cells between dark joints, on teal."""
    centres = (np.stack(np.meshgrid(np.arange(10), np.arange(10)), -1).reshape(-1, 2) + 0.5) * SIZE / 10
    centres = centres + rng.uniform(-8, 8, centres.shape)
    distance, cell = cKDTree(centres[:, ::-1]).query(np.stack(_grid(), -1), k=2)
    nearest, second = distance[..., 0], distance[..., 1]
    picture = _paper(art, (0.05, 0.50, 0.52))
    label = cell[..., 0] * 2 + (_alpha(art) > 0.5)
    count = np.maximum(np.bincount(label.ravel()), 1)
    means = np.stack([np.bincount(label.ravel(), picture[..., c].ravel()) / count for c in range(3)], -1)
    tiles = 0.35 * means[label] + 0.65 * picture
    hsv = color.rgb2hsv(np.clip(tiles, 0, 1))
    hsv[..., 1] = np.clip(hsv[..., 1] * 1.25, 0, 1)
    joints = np.maximum(np.clip(1 - (second - nearest) / 7, 0, 1), 0.9 * _lines(art, 2, 2.5))
    return _reduce(_mix(joints, color.hsv2rgb(hsv), (0.10, 0.08, 0.10)))


def chalk(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Broken pale strokes and a dusty filling on a green board."""
    dust = np.clip(0.55 + 0.5 * _grain(rng, 1.2), 0, 1)
    ink = np.clip(_lines(art, 3, 4) * np.clip(0.6 + dust, 0, 1) + 0.45 * _alpha(art) * _shade(art) * dust, 0, 1)
    board = np.float32((0.13, 0.30, 0.22)) + 0.02 * _grain(rng, 16)[..., None]
    return _reduce(_mix(ink, board, (0.96, 0.94, 0.84)))


def popart(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Four flat inks by shade, on turquoise."""
    inks = np.float32([(0.17, 0.08, 0.42), (0.91, 0.10, 0.52), (1.0, 0.55, 0.10), (1.0, 0.92, 0.23)])
    level = np.clip((ndimage.gaussian_filter(_shade(art), 2.5) / 0.86 * 4).astype(int), 0, 3)
    return _reduce(_mix((_alpha(art) > 0.5).astype(np.float32), (0.24, 0.85, 0.87), inks[level]))


def thermal(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """False colours of a heat camera, from a violet night to a yellow glow."""
    heat = np.where(_alpha(art) > 0.5, 0.45 + 0.55 * _shade(art) / 0.85, 0.0)
    heat = ndimage.gaussian_filter(heat, 2.5) * (1 - 0.25 * _lines(art, 2.5, 3))
    stops = np.float32(
        [(0.07, 0.02, 0.22), (0.35, 0.05, 0.48), (0.80, 0.15, 0.38), (0.98, 0.50, 0.08), (1.0, 0.95, 0.55)]
    )
    channels = [np.interp(heat, np.linspace(0, 1, len(stops)), stops[:, c]) for c in range(3)]
    return _reduce(np.stack(channels, -1).astype(np.float32))


# The colour sets that the techniques are applied to; the stencil comes from a set of its own.
COLOUR = ("twemoji", "noto")
TECHNIQUES: dict[str, tuple[tuple[str, ...], Callable[[Image.Image, np.random.Generator], Image.Image]]] = {
    "stencil": (("fluent-emoji-high-contrast",), hand),
    **{f.__name__: (COLOUR, f) for f in
       (pixel, pencil, woodcut, blueprint, halftone, neon, watercolour, mosaic, chalk, popart, thermal)},
    PLAIN: (COLOUR, hand),
}  # fmt: skip
