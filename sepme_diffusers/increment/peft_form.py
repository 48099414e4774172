"""Changes of weights as a PEFT LoRA; a per-module increment as one, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor

from sepme_diffusers.increment.increment import Increment

if TYPE_CHECKING:
    from peft import LoraConfig

_PREFIX = "base_model.model."

# Changes of weights by module name: A (r, d_in) and C (d_out, r) of each ΔW = C A.
Factors = Mapping[str, tuple[Tensor, Tensor]]


def lora(factors: Factors) -> tuple[dict[str, Tensor], LoraConfig]:
    """Give changes of weights as the state dict and config of a PEFT LoRA of scale 1 (lora_alpha = r).

    Args:
        factors: What changes; all of one rank.
    """
    from peft import LoraConfig  # takes seconds, with all of transformers; reading a bank needs none of it

    tensors = {}
    for name, (a, c) in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.clone()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = c.contiguous()
    rank = len(next(iter(factors.values()))[0])
    return tensors, LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(factors), bias="none")


def to_lora(increment: Increment) -> tuple[dict[str, Tensor], LoraConfig]:
    """Give a per-module increment as a PEFT LoRA, see `lora`.

    A LoRA has no gate: it acts on every prompt, in proportion.

    Raises:
        ValueError: If the increment is text-side, or acts at further doors: what it does there is no change of weights
            until the base's weights are known.
    """
    if increment.C is None:
        raise ValueError("a text-side increment is not a LoRA; expand it with the base's weights first")
    if increment.doors:
        raise ValueError(f"an increment that acts at the further doors {list(increment.doors)} is not a LoRA")
    return lora({name: (increment.A, c) for name, c in increment.C.items()})


def peft_files(tensors: Mapping[str, Tensor], config: LoraConfig) -> dict[str, bytes]:
    """Give a PEFT LoRA as the files of its folder, the weights first; the same bytes for the same LoRA."""
    settings = {key: value for key, value in config.to_dict().items() if value is not None}
    settings["target_modules"] = sorted(settings["target_modules"])
    plain = json.dumps(settings, indent=2, sort_keys=True, default=str).encode()
    numbers = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return {"adapter_model.safetensors": save(numbers, {"format": "pt"}), "adapter_config.json": plain}


def base_of_lora(keys: Iterable[str]) -> str:
    """Return which of the keys of a LoRA is of an A; all of them are, in the LoRA of an increment.

    Raises:
        ValueError: If there is none.
    """
    if (key := next((key for key in keys if key.endswith(".lora_A.weight")), None)) is None:
        raise ValueError("not the LoRA of an increment: it has no lora_A")
    return key


def factors_of(tensors: Mapping[str, Tensor]) -> Factors:
    """Read the changes of weights of which `lora` gave the state dict.

    Raises:
        ValueError: On keys that are not of such a LoRA; lists them all.
    """
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        name, _, factor = key.removeprefix(_PREFIX).rpartition(".lora_")
        if key.startswith(_PREFIX) and factor in ("A.weight", "B.weight"):
            (down if factor == "A.weight" else up)[name] = tensor
        else:
            unknown.append(key)
    if unknown or not up or set(down) != set(up):
        raise ValueError(
            f"not the LoRA of an increment; unexpected or unpaired keys: {unknown or sorted(set(down) ^ set(up))}"
        )
    return {name: (down[name], c) for name, c in up.items()}


def from_lora(tensors: Mapping[str, Tensor], gate: float | None = None) -> Increment:
    """Read the increment that `to_lora` wrote.

    Args:
        tensors: The state dict.
        gate: The increment's, which a LoRA cannot hold.

    Raises:
        ValueError: On keys that are not of such a LoRA, or if the modules do not share one A; lists them all.
    """
    factors = factors_of(tensors)
    first, _ = next(iter(factors.values()))
    # First of all: numbers of unusual types cannot be compared.
    increment = Increment(first, C={name: c for name, (_, c) in factors.items()}, gate=gate)
    if different := [n for n, (a, _) in factors.items() if a.dtype != first.dtype or not torch.equal(a, first)]:
        raise ValueError(f"the modules of an increment share one lora_A; these differ: {different}")
    return increment
