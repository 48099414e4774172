"""An erased set, or every concept of a bank, as LoRA files that other tools load without this package."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import logging
from safetensors.torch import save_file
from torch import Tensor, nn

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.disk.layout import LORA_FILE
from sepme_diffusers.doors.registry import door_linears
from sepme_diffusers.increment.peft_form import Factors, lora
from sepme_diffusers.interchange import original_names
from sepme_diffusers.interchange.merge import Erased, fitting_unet, merged_changes, strengths_of
from sepme_diffusers.interchange.placement import checked_path, note, placed

LoraFormat = Literal["peft", "diffusers", "kohya"]

logger = logging.get_logger(__name__)

_PEFT_PREFIX = "base_model.model."


def export_lora(
    bank: ConceptBank,
    pipe_or_unet: DiffusionPipeline | nn.Module,
    erased: Erased,
    path: str | Path,
    format: LoraFormat = "peft",
) -> Path:
    """Write one erased set as one LoRA, which other tools load at strength 1 without this package.

    Args:
        bank: Where the increments come from.
        pipe_or_unet: The base, only read. With a pipeline it is also checked that the bank fits the text encoder.
        erased: Names, or {name: strength}; the strengths are baked in.
        path: A folder for "peft" (`adapter_config.json`, `adapter_model.safetensors`) and for "diffusers"
            (`pytorch_lora_weights.safetensors`); a file ending in .safetensors for "kohya" (ComfyUI, A1111,
            sd-scripts), whose names are diffusers' for Stable Diffusion 1 and 2 and the original ones for SDXL.
        format: Which of these.

    Returns:
        The path that was written.

    Raises:
        ValueError: On an unknown format or name, an empty set, a bad strength, a bank of another base, weights that
            are offloaded, a set that leaves out what the bank's policy always erases, an increment that no change of
            weights can hold, or the current folder as path.
        TypeError: If a single string is given for the erased set.
        FileExistsError: If something is there that no export wrote. Nothing is written or removed in all these cases.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, export_lora, pocket
        >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
        >>> export_lora(pocket.bank("styles"), pipe, ["neon"], "neon.safetensors", format="kohya").name
        'neon.safetensors'
    """
    path = checked_path(path, format, get_args(LoraFormat))
    unet = fitting_unet(bank, pipe_or_unet)
    strengths = strengths_of(bank, erased)
    changes = merged_changes(bank, unet, strengths)
    metadata = note(bank, format, strengths)
    with placed(path, format, metadata) as place:
        if format == "peft":
            _write_peft(changes, place)
        elif format == "diffusers":
            layers = {key.removeprefix(_PEFT_PREFIX): tensor for key, tensor in lora(changes)[0].items()}
            StableDiffusionLoraLoaderMixin.save_lora_weights(place, unet_lora_layers=layers)
        else:
            _warn_of_sd_scripts(unet, changes)
            tensors = kohya_tensors(changes, _kohya_names(unet, changes))
            save_file(tensors, place, {**metadata, **_kohya_metadata(changes)})
    return path


def export_adapters(
    bank: ConceptBank, pipe_or_unet: DiffusionPipeline | nn.Module, folder: str | Path
) -> dict[str, Path]:
    """Write every concept of a bank as a PEFT LoRA folder of its own, to be combined by whoever loads them.

    Whoever loads them can leave out what the bank's policy always erases; use `export_lora` for a set that must stay
    together.

    Args:
        bank: Where the increments come from; `bank.subset` for some of them.
        pipe_or_unet: The base, see `export_lora`.
        folder: Made if missing.

    Returns:
        The folder of each concept.

    Raises:
        ValueError: If the bank is empty or of another base.
        FileExistsError: If something is there that no export wrote. Nothing is written or removed in either case.
    """
    path = checked_path(folder, "peft", get_args(LoraFormat))
    unet = fitting_unet(bank, pipe_or_unet)
    strengths = strengths_of(bank, list(bank))
    folders: dict[str, str] = {}
    with placed(path, "peft", note(bank, "peft", strengths)) as place:
        for name, strength in strengths.items():
            folders[name] = _free_name(bank[name].concept.slug, folders.values())
            (place / folders[name]).mkdir()
            _write_peft(merged_changes(bank, unet, {name: strength}), place / folders[name])
    return {name: path / folder for name, folder in folders.items()}


def kohya_tensors(changes: Factors, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Name changes of weights as kohya's LoRA files do; alpha is the rank.

    Args:
        changes: What changes.
        names: {module name: the name to write in its place}, where they differ.
    """
    tensors = {}
    for module, (a, c) in changes.items():
        key = "lora_unet_" + (names or {}).get(module, module).replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = a.clone()
        tensors[f"{key}.lora_up.weight"] = c.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(len(a)))
    return tensors


def _kohya_names(unet: UNet2DConditionModel, modules: Iterable[str]) -> dict[str, str]:
    """sd-scripts trains Stable Diffusion 1 and 2 on diffusers' UNet, but SDXL on the original one."""
    if unet.config.get("addition_embed_type") != "text_time":
        return {}
    return original_names.unet_names(modules, unet.config.layers_per_block)


def _warn_of_sd_scripts(unet: UNet2DConditionModel, changes: Factors) -> None:
    if outside := [module for module, _ in door_linears(unet).values() if module in changes]:
        logger.warning(
            f"{outside}: diffusers and ComfyUI read the key of this module. The image generation of sd-scripts passes "
            "it over, and leaves that part of the erasure out; use a checkpoint there"
        )


def _kohya_metadata(changes: Factors) -> dict[str, str]:
    rank = str(len(next(iter(changes.values()))[0]))
    return {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}


def _write_peft(changes: Factors, folder: Path) -> None:
    tensors, config = lora(changes)
    save_file(tensors, folder / LORA_FILE, {"format": "pt"})
    config.save_pretrained(folder)


def _free_name(slug: str, taken: Collection[str]) -> str:
    return slug if slug not in taken else next(f"{slug}-{n}" for n in count(2) if f"{slug}-{n}" not in taken)
