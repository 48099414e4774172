"""The whole model with an erased set fused into its weights, as a folder or as a single file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils.torch_utils import unwrap_module
from safetensors.torch import save_file
from torch import Tensor, nn

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.doors.linears import linear_weight
from sepme_diffusers.increment.peft_form import Factors
from sepme_diffusers.interchange import original_names
from sepme_diffusers.interchange.merge import Erased, fitting_unet, merged_changes, strengths_of
from sepme_diffusers.interchange.placement import checked_path, note, placed

CheckpointFormat = Literal["diffusers", "single_file"]


def export_checkpoint(
    bank: ConceptBank,
    pipe: DiffusionPipeline,
    erased: Erased,
    path: str | Path,
    format: CheckpointFormat = "diffusers",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the whole model with an erased set fused into its weights. The pipeline is only read; it may be compiled.

    The sum is made in float32 and cast once. In half precision the fused weight is rounded, so the guarded prompts are
    kept to that precision and no longer exactly.

    Args:
        bank: Where the increments come from.
        pipe: A Stable Diffusion 1.x, 2.x or XL pipeline.
        erased: Names, or {name: strength}.
        path: A folder for "diffusers", which `from_pretrained` reads; a file ending in .safetensors for "single_file",
            in the original key names, which `from_single_file`, ComfyUI and A1111 read.
        format: Which of these.
        dtype: Of every weight that is written. Default: each component's own.

    Returns:
        The path that was written.

    Raises:
        ValueError: As `export_lora`; or if the UNet has adapters loaded.
        TypeError, FileExistsError: As `export_lora`.
    """
    path = checked_path(path, format, get_args(CheckpointFormat))
    unet = fitting_unet(bank, pipe)
    strengths = strengths_of(bank, erased)
    _refuse_unfusable(unet)
    fused = _fused_pipeline(pipe, merged_changes(bank, unet, strengths), dtype)
    metadata = note(bank, format, strengths)
    with placed(path, format, metadata) as place:
        if format == "diffusers":
            fused.save_pretrained(place)
        else:
            save_file(single_file_tensors(fused), place, metadata)
    return path


def single_file_tensors(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """Name the tensors of a Stable Diffusion 1.x, 2.x or XL pipeline as the original code does.

    Raises:
        ValueError: If something in it has no original name.
    """
    parts = {
        "model.diffusion_model": _original_unet(pipe.unet),
        "first_stage_model": original_names.vae(pipe.vae.state_dict(), len(pipe.vae.config.block_out_channels)),
    }
    first = pipe.text_encoder.state_dict()
    if getattr(pipe, "text_encoder_2", None) is not None:
        parts["conditioner.embedders.0.transformer"] = original_names.clip(first)
        parts["conditioner.embedders.1.model"] = original_names.open_clip(pipe.text_encoder_2.state_dict())
    elif pipe.text_encoder.config.hidden_size == 1024:  # OpenCLIP's ViT-H, which only Stable Diffusion 2.x has
        parts["cond_stage_model.model"] = original_names.open_clip(first)
    else:
        parts["cond_stage_model.transformer"] = original_names.clip(first)
    return {
        f"{prefix}.{name}": tensor.detach().cpu().contiguous()
        for prefix, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def _original_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    state = unet.state_dict()
    names = original_names.unet_names(state, unet.config.layers_per_block)
    return {names[name]: tensor for name, tensor in state.items()}


def _refuse_unfusable(unet: nn.Module) -> None:
    if adapters := list(getattr(unet, "peft_config", {})):
        raise ValueError(
            f"the UNet has the adapters {adapters} loaded; a checkpoint would be written without them. Call "
            "unload_lora_weights() first, after fuse_lora() if they are to be part of it"
        )


def _fused_pipeline(pipe: DiffusionPipeline, changes: Factors, dtype: torch.dtype | None) -> DiffusionPipeline:
    """Make a pipeline of the plain class in diffusers that shares with the given one what stays as it is."""
    fused = copy.copy(pipe)
    package = __name__.split(".")[0]
    fused.__class__ = next(kind for kind in type(pipe).__mro__ if kind.__module__.split(".")[0] != package)
    modules = {name: unwrap_module(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    for name, module in modules.items():
        if name == "unet":
            setattr(fused, name, _fused_unet(module, changes, dtype))
        else:
            setattr(fused, name, module if dtype is None else copy.deepcopy(module).to(dtype))
    return fused


def _fused_unet(unet: UNet2DConditionModel, changes: Factors, dtype: torch.dtype | None) -> UNet2DConditionModel:
    """Make a UNet of its own modules, so that no hook and no failure can touch the given one; tensors are shared."""
    with torch.device("meta"):
        fused = type(unet).from_config(unet.config)
    modules = dict(unet.named_modules())
    sums = {}
    for name, (a, c) in changes.items():
        weight = linear_weight(modules[name]).float()
        sums[f"{name}.weight"] = weight + (c @ a).to(weight.device)
    own = unet.state_dict()
    state = {key: sums.get(key, own[key]).to(dtype or own[key].dtype) for key in fused.state_dict()}
    fused.load_state_dict(state, assign=True)
    return fused
