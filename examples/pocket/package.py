"""Put the trained parts together as the model folders that the package ships, in half precision.

python examples/pocket/package.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from train_denoiser import scheduler
from transformers import CLIPTextModel, CLIPTokenizer

POCKET = Path(__file__).parents[2] / "sepme_diffusers" / "pocket"
CARD = """---
license: apache-2.0
library_name: diffusers
tags: [stable-diffusion, text-to-image, sepme]
---

# Pocket: a small Stable Diffusion for trying concept erasure

64 x 64 pictures of 110 objects in 12 styles. Trained by examples/pocket of sepme_diffusers, for tests and
demonstrations, on emoji art: Noto Emoji (Google, Apache-2.0), Twemoji (Twitter and contributors, CC-BY-4.0), Fluent
Emoji High Contrast (Microsoft, MIT). The techniques (pixel, woodcut ...) are applied to that art by the recipe.
"""


def assemble(work: Path, unet: Path) -> StableDiffusionPipeline:
    """The pipeline of the trained parts, float16."""
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder_final"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(unet),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)


def tidy(config: Path) -> None:
    """Take out where the part was trained, and name float32: transformers loads in the precision named there."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    if "dtype" in values:
        values["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def replace_folder(target: Path) -> Path:
    """An empty folder in the place of `target`."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    return target


def main(work: Path = Path("pocket-work"), target: Path = POCKET) -> None:
    """Write target/model, target/variant (where it is trained) and target/judge.safetensors."""
    assemble(work, work / "unet").save_pretrained(replace_folder(target / "model"))
    (target / "model" / "README.md").write_text(CARD)
    if (work / "variant" / "unet").exists():
        unet = UNet2DConditionModel.from_pretrained(work / "variant" / "unet", torch_dtype=torch.float16)
        unet.save_pretrained(replace_folder(target / "variant"))
    for config in (*target.glob("model/*/config.json"), *target.glob("variant/config.json")):
        tidy(config)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e6
    typer.echo(f"{target}: {size:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
