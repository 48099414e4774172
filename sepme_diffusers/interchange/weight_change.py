"""Other erasers' files as weight changes: which module of the UNet they change, and by how much."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from sepme_diffusers.bank.disk.layout import LORA_CONFIG, LORA_FILE
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.doors.registry import door_linears
from sepme_diffusers.interchange import original_names

Source = str | Path | Mapping[str, Tensor]

# How tools spell lora_A and lora_B: PEFT, diffusers old and new, kohya.
_FACTOR = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](A|down|B|up)(?:\.\w+)?\.weight")
_DOWN = ("A", "down")
_UNET_PREFIXES = ("", "unet.", "base_model.model.", "unet.base_model.model.")
_ORIGINAL_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_IN_FOLDER = (
    LORA_FILE,
    "pytorch_lora_weights.safetensors",
    "diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
)


@dataclass(frozen=True)
class WeightChange:
    """What an eraser changes.

    Args:
        kind: What it was read from.
        inside: ΔW_m (d_out, d) of each text projection that changes, float32.
        further: ΔW (d_out, d) of the Linear that reads a further door's embedding, in the columns that do, by door.
        outside: ‖ΔW‖ of everything else that changes, by the name in the source; a bank cannot hold it.
        unread: Names in the source that are no part of the UNet and were not compared.
    """

    kind: Literal["lora", "weights"]
    inside: Mapping[str, Tensor]
    further: Mapping[str, Tensor]
    outside: Mapping[str, float]
    unread: tuple[str, ...] = ()

    @property
    def share_inside(self) -> float:
        """The share of the whole change that is of what reads the text, by squared norm."""
        inside = sum(float(delta.double().square().sum()) for delta in (*self.inside.values(), *self.further.values()))
        outside = sum(norm**2 for norm in self.outside.values())
        return inside / (inside + outside) if inside + outside else 0.0


def read_change(
    source: Source, unet: nn.Module, difference: bool = False, doors: Mapping[str, int] | None = None
) -> WeightChange:
    """Read what an eraser changes, from tensors or from a file.

    Args:
        source: Tensors by name, a .safetensors file, or a folder with one: a LoRA in PEFT's, diffusers' or kohya's
            keys, or edited weights of the UNet in diffusers' or the original names (all, or those that changed).
        unet: The UNet that the eraser was made on.
        difference: The source's weights are differences, not edited weights.
        doors: {door: width of its embedding} of the further doors to keep. A change at others counts as outside.

    Raises:
        FileNotFoundError: If there is no such file, or none in the folder.
        ValueError: If nothing in it is understood, or it was made for another UNet.
    """
    tensors, settings = _load(source)
    if any(_FACTOR.fullmatch(key) for key in tensors):
        return _lora_change(tensors, settings, unet, doors or {})
    return _weight_change(tensors, unet, difference, doors or {})


def _load(source: Source) -> tuple[dict[str, Tensor], LoraConfig | None]:
    """Load the tensors, and the LoRA's settings where they are kept beside or in the file."""
    if isinstance(source, Mapping):
        return dict(source), None
    file = _file(Path(source))
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no iterator)
        header = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if (file.parent / LORA_CONFIG).is_file():
        return tensors, LoraConfig.from_pretrained(file.parent)
    settings = {key.removeprefix("unet."): value for key, value in header.items() if key.startswith("unet.")}
    return tensors, LoraConfig(**settings) if settings else None


def _file(path: Path) -> Path:
    candidates = [path / name for name in _IN_FOLDER] if path.is_dir() else [path]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no eraser at {path}: looked for {[str(candidate) for candidate in candidates]}")
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{file} is not a .safetensors file, and nothing else is unpickled here; if you trust it, load it with "
            "torch.load(file, weights_only=True) and pass the tensors"
        )
    return file


def _lora_change(
    tensors: dict[str, Tensor], settings: LoraConfig | None, unet: nn.Module, doors: Mapping[str, int]
) -> WeightChange:
    factors: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if match := _FACTOR.fullmatch(key):
            factors.setdefault(match[1], {})["down" if match[2] in _DOWN else "up"] = tensor
        elif not key.endswith(".alpha"):
            unknown.append(key)
    unknown += [f"{module} (one factor of two)" for module, pair in factors.items() if len(pair) < 2]
    if unknown or (settings is not None and settings.use_dora):
        raise ValueError(f"not a plain LoRA but DoRA, LyCORIS or a damaged file: {unknown or 'its settings say DoRA'}")
    own_names = _own_names(_text_weights(unet), unet)
    read: dict[str, Tensor] = {}
    outside: dict[str, float] = {}
    for module, pair in factors.items():
        scale = _scale(module, len(pair["down"]), tensors.get(f"{module}.alpha"), settings)
        delta = scale * pair["up"].flatten(1).float() @ pair["down"].flatten(1).float()
        if module in own_names:
            read[own_names[module]] = delta
        elif norm := float(delta.norm()):
            outside[module] = norm
    return _sorted_out("lora", read, outside, unet, doors)


def _scale(module: str, rank: int, alpha: Tensor | None, settings: LoraConfig | None) -> float:
    if alpha is not None:
        return float(alpha) / rank
    if settings is None:
        return 1.0
    own = settings.alpha_pattern.get(get_pattern_key(settings.alpha_pattern, module), settings.lora_alpha)
    return own / (rank**0.5 if settings.use_rslora else rank)


def _weight_change(
    tensors: dict[str, Tensor], unet: nn.Module, difference: bool, doors: Mapping[str, int]
) -> WeightChange:
    base = {name.replace(".base_layer.", "."): weight for name, weight in unet.state_dict().items()}
    own_names = _own_names(base, unet)
    readers = {f"{name}.weight": name for name in _text_weights(unet)}
    read: dict[str, Tensor] = {}
    outside: dict[str, float] = {}
    for key in tensors.keys() & own_names.keys():
        name, new = own_names[key], tensors[key]
        # Rounded as the file is: an untouched weight of a half-precision file has not changed.
        old = torch.zeros_like(new) if difference else base[name].detach().to(new.device, new.dtype)
        if old.shape != new.shape:
            raise ValueError(
                f"made for another UNet: {key} is {tuple(new.shape)} there and {tuple(old.shape)} in this one"
            )
        delta = new.float() - old.float()
        if not delta.any():
            continue
        if name in readers:
            read[readers[name]] = delta
        else:
            outside[key] = float(delta.norm())
    unread = tuple(key for key in tensors if key not in own_names)
    if len(unread) == len(tensors):
        raise ValueError(
            f"nothing in it is a LoRA or a weight of this UNet; its keys are like {list(unread[:3])}, understood are "
            "PEFT's, diffusers' and kohya's LoRA keys, and weights in diffusers' or the original names"
        )
    return _sorted_out("weights", read, outside, unet, doors, unread)


def _text_weights(unet: nn.Module) -> dict[str, Tensor]:
    """The weights of everything that reads text, by module name: text projections, and what reads further doors."""
    return projection_weights(unet) | dict(door_linears(unet).values())


def _sorted_out(
    kind: Literal["lora", "weights"],
    read: dict[str, Tensor],
    outside: dict[str, float],
    unet: nn.Module,
    doors: Mapping[str, int],
    unread: tuple[str, ...] = (),
) -> WeightChange:
    """Sort the changes of what reads text into text projections, further doors, and columns that read no text."""
    weights = _text_weights(unet)
    both = {name: (tuple(delta.shape), tuple(weights[name].shape)) for name, delta in read.items()}
    if wrong := {name: shapes for name, shapes in both.items() if shapes[0] != shapes[1]}:
        raise ValueError(f"made for another UNet: shapes (eraser, UNet) differ: {wrong}")
    further: dict[str, Tensor] = {}
    for door, (module, _) in door_linears(unet).items():
        if module not in read:
            continue
        text, others = read.pop(module).tensor_split([doors.get(door, 0)], dim=1)
        if text.any():
            further[door] = text
        if others.any():
            outside[module] = float(others.norm())
    inside = {name: read[name] for name in weights if name in read}
    return WeightChange(kind, inside, further, outside, unread)


def _own_names(names: Mapping[str, Tensor], unet: nn.Module) -> dict[str, str]:
    """Map each name as some tool writes it to the UNet's own."""
    own = {f"{prefix}{name}": name for name in names for prefix in _UNET_PREFIXES}
    own |= {re.sub(r"\.(to_[kv])$", r".processor.\1", written): name for written, name in own.items()}
    own |= {f"lora_unet_{name.replace('.', '_')}": name for name in names}
    for name, original in _original_names(names, unet).items():
        own |= {f"{prefix}{original}": name for prefix in _ORIGINAL_PREFIXES}
        own[f"lora_unet_{original.replace('.', '_')}"] = name
    return own


def _original_names(names: Mapping[str, Tensor], unet: UNet2DConditionModel) -> dict[str, str]:
    try:
        return original_names.unet_names(names, unet.config.layers_per_block)
    except (TypeError, ValueError):  # a UNet that the original code does not have, so no file has its names
        return {}
