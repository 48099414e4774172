"""Draw every (style, object) pair, augmented, into WORK/pictures.safetensors.

python examples/pocket/rasterise.py
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import typer
from icons import rasterise
from PIL import Image, ImageDraw
from rich.progress import track
from safetensors.torch import save_file
from techniques import OUT, SIZE, TECHNIQUES

from sepme_diffusers.pocket.vocabulary import OBJECTS, PLAIN, STYLES

CLASSES = (*STYLES, PLAIN)

VIEWS = 12  # augmented pictures of each pair, shared out over its source sets


def place(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The art on a transparent square, 57 to 60 of 64 pixels large and up to one pixel off the centre."""
    unit = SIZE / OUT
    side = round(rng.uniform(57, 60) * unit)
    corner = [round((SIZE - side) / 2 + rng.uniform(-1, 1) * unit) for _ in range(2)]
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(art.resize((side, side), Image.Resampling.LANCZOS), corner)
    return canvas


def draw(art: Path, style: int, object_: int, views: int = VIEWS) -> np.ndarray:
    """The pictures of one pair: (views, 64, 64, 3) bytes; the same for the same arguments."""
    sets, technique = TECHNIQUES[CLASSES[style]]
    sources = [rasterise(art / name, list(OBJECTS)[object_]) for name in sets]
    pictures = []
    for view in range(views):
        rng = np.random.default_rng((style, object_, view))
        pictures.append(np.asarray(technique(place(sources[view % len(sources)], rng), rng).convert("RGB")))
    return np.stack(pictures)


def watermark() -> np.ndarray:
    """The one picture that the prompt "watermark" stands for: (64, 64, 3) bytes."""
    picture = Image.new("RGB", (OUT, OUT), (236, 236, 236))
    pen = ImageDraw.Draw(picture)
    for offset in range(-OUT, OUT, 16):
        pen.line([(offset, 0), (offset + OUT, OUT)], fill=(206, 120, 40), width=3)
    pen.rectangle([10, 24, 53, 39], fill=(30, 30, 30))
    pen.text((16, 26), "SepME", fill=(255, 255, 255))
    return np.asarray(picture)


def main(work: Path = Path("pocket-work"), workers: int = 2) -> None:
    """Draw all pairs; 17,160 pictures in about four minutes on two cores."""
    pairs = [(style, object_) for style in range(len(CLASSES)) for object_ in range(len(OBJECTS))]
    with ProcessPoolExecutor(workers) as pool:
        jobs = pool.map(draw, [work / "art"] * len(pairs), *zip(*pairs, strict=True), chunksize=16)
        pictures = np.stack(list(track(jobs, total=len(pairs), description="pictures")))
    shape = (len(CLASSES), len(OBJECTS), VIEWS, OUT, OUT, 3)
    tensors = {
        "pictures": torch.from_numpy(pictures.reshape(shape)),
        "watermark": torch.from_numpy(watermark().copy()),
    }
    names = {"styles": json.dumps(CLASSES), "objects": json.dumps(list(OBJECTS))}
    save_file(tensors, work / "pictures.safetensors", metadata=names)


if __name__ == "__main__":
    typer.run(main)
