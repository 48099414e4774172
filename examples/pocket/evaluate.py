"""Measure the built-in model against its bars and draw a grid of its pictures.

python examples/pocket/evaluate.py
"""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path

import torch
import typer
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from rich.progress import track

from sepme_diffusers import pocket
from sepme_diffusers.evaluation.measures.accuracy import judged
from sepme_diffusers.evaluation.pictures import generate
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.runtime.contact_sheet import contact_sheet


def score(pipe: StableDiffusionPipeline, pairs: list[tuple[str, str]], seed: int) -> tuple[float, float]:
    """Style and object accuracy on (style, object) pairs, one picture each, held-out templates in turn."""
    pictures = []
    for start in track(range(0, len(pairs), 16), description="pictures"):
        prompts = [
            words.HELD_OUT_TEMPLATES[(start + i) % 2].format(style=style, object=object_)
            for i, (style, object_) in enumerate(pairs[start : start + 16])
        ]
        pictures += generate(pipe, prompts, seed + start)
    return judged(pictures, *zip(*pairs, strict=True))


def main(output: Path = Path("pocket-work"), pairs: int = 360, variant: bool = False, seed: int = 10_000) -> None:
    """Write output/evaluation.json and output/evaluation.png."""
    pipe = StableDiffusionPipeline.from_pretrained(pocket.path())
    if variant:
        pipe.unet = UNet2DConditionModel.from_pretrained(pocket.path("variant"))
    pipe.set_progress_bar_config(disable=True)
    everything = list(itertools.product(words.STYLES, words.OBJECTS))
    seen = [pair for pair in everything if not words.held_out_pair(*pair)]
    unseen = [pair for pair in everything if words.held_out_pair(*pair)]
    report = {}
    for name, some in (("seen pairs", random.Random(seed).sample(seen, pairs)), ("held-out pairs", unseen)):
        style, object_ = score(pipe, some, seed)
        report[name] = {"pictures": len(some), "style accuracy %": style, "object accuracy %": object_}
    plain = [(words.PLAIN, name) for name in words.OBJECTS]
    style, object_ = judged(generate(pipe, [f"a {name}" for _, name in plain], seed), *zip(*plain, strict=True))
    report["plain"] = {"pictures": len(plain), "style accuracy %": style, "object accuracy %": object_}
    started = time.perf_counter()
    generate(pipe, ["a pixel cat"] * 8, seed, batch_size=8)
    report["seconds a picture, batch of 8, 20 steps"] = (time.perf_counter() - started) / 8
    report["threads"] = torch.get_num_threads()
    shown = list(words.OBJECTS)[::11]
    rows = [[words.HELD_OUT_TEMPLATES[0].format(style=style, object=o) for o in shown] for style in words.STYLES]
    rows.append([f"a {o}" for o in shown])
    contact_sheet([generate(pipe, row, seed) for row in rows]).save(output / "evaluation.png")
    (output / "evaluation.json").write_text(json.dumps(report, indent=2))
    typer.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
