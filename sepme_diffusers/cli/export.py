"""`sepme export`: an erased set for other tools."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sepme_diffusers.cli.console import announce_loading, console, refusals

if TYPE_CHECKING:
    from sepme_diffusers.interchange.checkpoint import CheckpointFormat
    from sepme_diffusers.interchange.lora_files import LoraFormat


class Format(str, Enum):
    """What `export` writes."""

    PEFT = "peft"
    DIFFUSERS = "diffusers"
    KOHYA = "kohya"
    CHECKPOINT = "checkpoint"
    SINGLE_FILE = "single-file"


class Precision(str, Enum):
    """Precisions that `export` casts a checkpoint to."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


_CHECKPOINTS: dict[Format, CheckpointFormat] = {Format.CHECKPOINT: "diffusers", Format.SINGLE_FILE: "single_file"}


def export(
    bank: Annotated[str, typer.Argument(help="Folder or Hub id of the bank.")],
    base: Annotated[str, typer.Option(help="Folder or Hub id of the base model.")],
    erased: Annotated[list[str], typer.Option(help="A concept, or concept=strength; one option per concept.")],
    output: Annotated[Path, typer.Option(help="What to write: a folder, or a file ending in .safetensors.")],
    format: Annotated[
        Format, typer.Option(help="peft, diffusers or kohya: a LoRA. checkpoint, single-file: the whole model, fused.")
    ] = Format.KOHYA,
    dtype: Annotated[Precision, typer.Option(help="Of a whole model; a LoRA is always float32.")] = Precision.FLOAT32,
) -> None:
    """Write an erased set for PEFT, diffusers, kohya's tools, ComfyUI and others."""
    announce_loading("the base model")
    import torch
    from diffusers import DiffusionPipeline

    from sepme_diffusers import ConceptBank, export_checkpoint, export_lora
    from sepme_diffusers.interchange.merge import gates_lost

    with refusals():
        loaded, strengths = ConceptBank.from_pretrained(bank), dict(map(_strength, erased))
        pipe = DiffusionPipeline.from_pretrained(base)
        if kind := _CHECKPOINTS.get(format):
            written = export_checkpoint(loaded, pipe, strengths, output, kind, getattr(torch, dtype.value))
        else:
            written = export_lora(loaded, pipe, strengths, output, cast("LoraFormat", format.value))
    console.print(f"Wrote {written}, which erases {', '.join(strengths)}")
    if lost := gates_lost(loaded, strengths):
        console.print(f"Note: {lost}")


def _strength(option: str) -> tuple[str, float]:
    """Split a concept, or concept=strength, into name and strength."""
    name, sign, strength = option.rpartition("=")
    try:
        return (name, float(strength)) if sign else (option, 1.0)
    except ValueError:
        return option, 1.0  # a name that has a "=" of its own
