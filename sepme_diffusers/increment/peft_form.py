"""A per-module increment as a PEFT LoRA, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sepme_diffusers.increment.increment import Increment

if TYPE_CHECKING:
    from peft import LoraConfig

_PREFIX = "base_model.model."


def to_lora(increment: Increment) -> tuple[dict[str, Tensor], LoraConfig]:
    """Give a per-module increment as the state dict and config of a PEFT LoRA of scale 1 (lora_alpha = r).

    A LoRA has no gate: it acts on every prompt, in proportion.

    Raises:
        ValueError: If the increment is text-side; `expand` it first.
    """
    if increment.C is None:
        raise ValueError("a text-side increment is not a LoRA; expand it with the base's weights first")
    from peft import LoraConfig  # for seconds, with all of transformers: reading a bank needs none of it

    tensors = {}
    for name, c in increment.C.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = increment.A.clone()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = c.contiguous()
    return tensors, LoraConfig(
        r=increment.rank, lora_alpha=increment.rank, target_modules=sorted(increment.C), bias="none"
    )


def from_lora(
    tensors: Mapping[str, Tensor], gate: float | None = None, doors: Mapping[str, Increment] | None = None
) -> Increment:
    """Read the increment that `to_lora` wrote.

    Args:
        tensors: The state dict.
        gate: What a LoRA cannot hold of an increment, see there.
        doors: Likewise.

    Raises:
        ValueError: On keys that are not of such a LoRA, or if the modules do not share one A; lists them all.
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
    first = next(iter(down.values()))
    if different := [name for name, a in down.items() if not torch.equal(a, first)]:
        raise ValueError(f"the modules of an increment share one lora_A; these differ: {different}")
    return Increment(first, C=up, gate=gate, doors=doors or {})
