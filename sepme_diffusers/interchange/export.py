"""A bank in other tools' formats: LoRA files, and checkpoints with the increments fused into the weights."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import refuse_other_text, refuse_other_weights
from sepme_diffusers.bank.contents import libraries
from sepme_diffusers.bank.files import replace_file
from sepme_diffusers.bank.layout import LORA_FILE
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.peft_form import to_lora
from sepme_diffusers.interchange import original_names
from sepme_diffusers.runtime.erased_sets import Names

logger = logging.get_logger(__name__)

LoraFormat = Literal["peft", "diffusers", "kohya"]
CheckpointFormat = Literal["diffusers", "single_file"]
Erased = Iterable[str] | Mapping[str, float]

NOTE = "sepme_export"
_NOTE_FILE = f"{NOTE}.json"
_IN_ONE_FILE = ("kohya", "single_file")
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
            are offloaded, or a set that leaves out what the bank's policy always erases.
        TypeError: If a single string is given for the erased set.
        FileExistsError: If something that this module did not write is there. Nothing is written in all these cases.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, pocket
        >>> from sepme_diffusers.interchange.export import export_lora
        >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
        >>> export_lora(pocket.bank("styles"), pipe, ["neon"], "neon.safetensors", format="kohya").name
        'neon.safetensors'
    """
    path = _checked_path(path, format, get_args(LoraFormat))
    unet = _fitting_unet(bank, pipe_or_unet)
    strengths = strengths_of(bank, erased)
    increment = merged_increment(bank, projection_weights(unet), strengths)
    note = _note(bank, format, strengths)
    with _replacing(path, format) as place:
        if format == "peft":
            _write_peft(increment, place)
        elif format == "diffusers":
            layers = {key.removeprefix(_PEFT_PREFIX): tensor for key, tensor in to_lora(increment)[0].items()}
            StableDiffusionLoraLoaderMixin.save_lora_weights(place, unet_lora_layers=layers)
        else:
            save_file(kohya_tensors(increment, _kohya_names(unet)), place, {**note, **_kohya_metadata(increment)})
        _leave_note(place, note)
    return path


def export_adapters(
    bank: ConceptBank, pipe_or_unet: DiffusionPipeline | nn.Module, folder: str | Path
) -> dict[str, Path]:
    """Write every concept of a bank as a PEFT LoRA folder of its own, to be combined by who loads them.

    Nothing holds the loader to the bank's policy; for a set that must stay together use `export_lora`.

    Args:
        bank: Where the increments come from; `bank.subset` for some of them.
        pipe_or_unet: The base, see `export_lora`.
        folder: Made if missing.

    Returns:
        The folder of each concept.

    Raises:
        ValueError: If the bank is empty or of another base.
        FileExistsError: If something that this module did not write is there. Nothing is written in either case.
    """
    path = _checked_path(folder, "peft", get_args(LoraFormat))
    unet = _fitting_unet(bank, pipe_or_unet)
    strengths = strengths_of(bank, list(bank))
    weights = projection_weights(unet)
    folders: dict[str, str] = {}
    with _replacing(path, "peft") as place:
        for name, strength in strengths.items():
            folders[name] = _free_name(bank[name].concept.slug, folders.values())
            (place / folders[name]).mkdir()
            _write_peft(merged_increment(bank, weights, {name: strength}), place / folders[name])
        _leave_note(place, _note(bank, "peft", strengths))
    return {name: path / folder for name, folder in folders.items()}


def export_checkpoint(
    bank: ConceptBank,
    pipe: DiffusionPipeline,
    erased: Erased,
    path: str | Path,
    format: CheckpointFormat = "diffusers",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the whole model with an erased set fused into its weights. The pipeline is only read.

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
    path = _checked_path(path, format, get_args(CheckpointFormat))
    unet = _fitting_unet(bank, pipe)
    strengths = strengths_of(bank, erased)
    _refuse_unfusable(unet)
    note = _note(bank, format, strengths)
    fused = _fused_pipeline(pipe, merged_increment(bank, projection_weights(unet), strengths), dtype)
    with _replacing(path, format) as place:
        if format == "diffusers":
            fused.save_pretrained(place)
        else:
            save_file(single_file_tensors(fused), place, note)
        _leave_note(place, note)
    return path


def strengths_of(bank: ConceptBank, erased: Erased) -> dict[str, float]:
    """An erased set as {name: strength} in the bank's order, by the rules of `set_erased`.

    Raises:
        TypeError: If a single string is given.
        ValueError: If it is empty, names what the bank lacks, has a strength that is not a finite number above zero,
            or leaves out what the policy always erases.
    """
    strengths = {concept: strength for (_, concept), strength in Names({"bank": bank}).strengths(erased).items()}
    if not strengths:
        raise ValueError(f"nothing to export: the erased set is empty; the bank has {list(bank)}")
    bank.obey_policy(strengths)
    return {name: strengths[name] for name in bank if name in strengths}


def merged_increment(bank: ConceptBank, weights: Mapping[str, Tensor], strengths: Mapping[str, float]) -> Increment:
    """The sum of increments as a single per-module one on the CPU: their ranks side by side, strengths in C.

    No LoRA and no fused weight has a gate: the sum acts on every prompt in proportion to what it reads. What was
    asked for is erased all the same; regular prompts move more than with the gates. A warning says so.

    Args:
        bank: Where the increments come from.
        weights: W_m by module name.
        strengths: {name: strength}, see `strengths_of`.

    Raises:
        ValueError: If an increment does not fit the weights.
    """
    increments = {name: bank[name].increment for name in strengths}
    if lost := gates_lost(bank, strengths):
        logger.warning(lost)
    parts = [(strengths[name], increment.coefficients(weights)) for name, increment in increments.items()]
    c = {module: torch.cat([strength * c[module].cpu() for strength, c in parts], dim=1) for module in weights}
    return Increment(torch.cat([increment.A.float().cpu() for increment in increments.values()]), C=c)


def gates_lost(bank: ConceptBank, names: Iterable[str]) -> str:
    """What to say of the gates of these concepts, which no export holds; empty if they have none."""
    gated = [name for name in names if bank[name].increment.gate is not None]
    if not gated:
        return ""
    return (
        f"the gates of {gated} are lost: what is exported acts on every prompt in proportion to what it reads. It "
        "erases at least as much, and regular prompts move more than under this package"
    )


def kohya_tensors(increment: Increment, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """A per-module increment under kohya's LoRA keys, alpha being its rank.

    Args:
        increment: In per-module form.
        names: {module name: the name that is spelt}, where they differ.
    """
    tensors = {}
    for module, c in increment.C.items():
        key = "lora_unet_" + (names or {}).get(module, module).replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = increment.A.clone()
        tensors[f"{key}.lora_up.weight"] = c.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(increment.rank))
    return tensors


def single_file_tensors(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """A Stable Diffusion 1.x, 2.x or XL pipeline's tensors under the original key names.

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


def _original_unet(unet: nn.Module) -> dict[str, Tensor]:
    state = unet.state_dict()
    names = original_names.unet_names(state, unet.config.layers_per_block)
    return {names[name]: tensor for name, tensor in state.items()}


def _kohya_names(unet: nn.Module) -> dict[str, str]:
    """sd-scripts trains Stable Diffusion 1 and 2 on diffusers' UNet, but SDXL on the original one."""
    if unet.config.get("addition_embed_type") != "text_time":
        return {}
    return original_names.unet_names(projection_weights(unet), unet.config.layers_per_block)


def _kohya_metadata(increment: Increment) -> dict[str, str]:
    rank = str(increment.rank)
    return {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}


def _write_peft(increment: Increment, folder: Path) -> None:
    tensors, config = to_lora(increment)
    save_file(tensors, folder / LORA_FILE, {"format": "pt"})
    config.save_pretrained(folder)


def _free_name(slug: str, taken: Collection[str]) -> str:
    return slug if slug not in taken else next(f"{slug}-{n}" for n in count(2) if f"{slug}-{n}" not in taken)


def _fitting_unet(bank: ConceptBank, pipe_or_unet: DiffusionPipeline | nn.Module) -> nn.Module:
    """The UNet, if the bank was made for it, and for the text encoder where there is one to ask."""
    unet = getattr(pipe_or_unet, "unet", pipe_or_unet)
    if any(weight.is_meta for weight in unet.parameters()):
        raise ValueError("the UNet's weights are offloaded; load the pipeline without offloading to export from it")
    refuse_other_weights(bank, projection_weights(unet))
    if unet is not pipe_or_unet:
        refuse_other_text(pipe_or_unet, [bank])
    return unet


def _refuse_unfusable(unet: nn.Module) -> None:
    if adapters := list(getattr(unet, "peft_config", {})):
        raise ValueError(
            f"the UNet has the adapters {adapters} loaded; a checkpoint would be written without them. Call "
            "unload_lora_weights() first, after fuse_lora() if they are to be part of it"
        )


def _fused_pipeline(pipe: DiffusionPipeline, increment: Increment, dtype: torch.dtype | None) -> DiffusionPipeline:
    """A pipeline that shares what it can with the given one, of its class as others know it."""
    fused = copy.copy(pipe)
    package = __name__.split(".")[0]
    fused.__class__ = next(kind for kind in type(pipe).__mro__ if kind.__module__.split(".")[0] != package)
    for name, component in pipe.components.items():
        if name == "unet":
            fused.unet = _fused_unet(component, increment, dtype)
        elif dtype is not None and isinstance(component, nn.Module):
            setattr(fused, name, copy.deepcopy(component).to(dtype))
    return fused


def _fused_unet(unet: nn.Module, increment: Increment, dtype: torch.dtype | None) -> nn.Module:
    """A UNet of its own modules, so that no hook and no failure can touch the given one; tensors are shared."""
    with torch.device("meta"):
        fused = type(unet).from_config(unet.config)
    weights = projection_weights(unet)
    sums = {
        f"{name}.weight": weights[name].float() + delta for name, delta in increment.delta_weights(weights).items()
    }
    own = unet.state_dict()
    state = {key: sums.get(key, own[key]).to(dtype or own[key].dtype) for key in fused.state_dict()}
    fused.load_state_dict(state, assign=True)
    return fused


def _note(bank: ConceptBank, format: str, strengths: Mapping[str, float]) -> dict[str, str]:
    """What was exported from what: safetensors metadata, and the mark of a file or folder that may be replaced."""
    note = {"format": format, "base": bank.base.name, "erased": dict(strengths), "libraries": libraries()}
    return {"format": "pt", NOTE: json.dumps(note, ensure_ascii=False)}


def _leave_note(place: Path, note: Mapping[str, str]) -> None:
    if place.is_dir():
        content = {**json.loads(note[NOTE]), "files": sorted(_files(place))}
        replace_file(place / _NOTE_FILE, json.dumps(content, indent=2, ensure_ascii=False).encode())


def _files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def _checked_path(path: str | Path, format: str, formats: tuple[str, ...]) -> Path:
    path = Path(path)
    if format not in formats:
        raise ValueError(f"no format {format!r}; choose one of {list(formats)}")
    if (format in _IN_ONE_FILE) != (path.suffix == ".safetensors"):
        wanted = "one file, whose name ends in .safetensors" if format in _IN_ONE_FILE else "a folder"
        raise ValueError(f"format {format!r} is written as {wanted}, not as {path.name!r}")
    if path.exists() and not _replaceable(path, format):
        raise FileExistsError(f"{path} is there and is not, or not only, what an export wrote; choose another name")
    return path


def _replaceable(path: Path, format: str) -> bool:
    if format not in _IN_ONE_FILE:
        return path.is_dir() and _files(path) <= _exported_files(path)
    try:
        with safe_open(path, "pt") as file:
            return NOTE in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _exported_files(folder: Path) -> set[str]:
    """What the note in a folder says was exported into it; what somebody added later is not to be lost."""
    try:
        return {_NOTE_FILE, *json.loads((folder / _NOTE_FILE).read_text("utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


@contextmanager
def _replacing(path: Path, format: str) -> Iterator[Path]:
    """A place to write to, beside the path, that takes its name when the block ends well and else leaves no trace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    place = staging / path.name
    try:
        if format not in _IN_ONE_FILE:
            place.mkdir()
        yield place
        _usual_permissions(place, staging / "probe")
        if path.is_dir():
            os.replace(path, staging / "former")
        os.replace(place, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _usual_permissions(place: Path, probe: Path) -> None:
    """safetensors writes files for their owner alone; these are for others too, as far as the umask allows."""
    probe.touch()
    mode = probe.stat().st_mode
    for file in [place] if place.is_file() else filter(Path.is_file, place.rglob("*")):
        file.chmod(mode)
