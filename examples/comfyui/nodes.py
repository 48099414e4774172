"""A ComfyUI node that erases any set of a concept bank's concepts from a model, as a LoRA made in the graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sepme_diffusers import ConceptBank
from sepme_diffusers.bank.compatibility import has_per_module, refuse_other_weights
from sepme_diffusers.bank.disk.layout import MANIFEST
from sepme_diffusers.doors.unet import UNET
from sepme_diffusers.interchange.lora_files import kohya_tensors
from sepme_diffusers.interchange.merge import merged_factors, strengths_of

_PREFIX = "lora_unet_"
_READS_TEXT = re.compile(_PREFIX + r".*_attn2_to_[kv]")


class EraseConcepts:
    """Model and bank in, model without the concepts out; another set in a second node of the same graph is fine."""

    CATEGORY = "loaders"
    FUNCTION = "erase"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "bank": ("STRING", {"default": "", "tooltip": "Folder or Hub id of the concept bank."}),
                "erased": (
                    "STRING",
                    {"default": "", "multiline": True, "tooltip": "One concept a line, or: concept = strength."},
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, model: Any, bank: str, erased: str) -> float:
        """A bank that was saved again is read again."""
        manifest = Path(bank) / MANIFEST
        return manifest.stat().st_mtime if manifest.is_file() else 0.0

    def erase(self, model: Any, bank: str, erased: str) -> tuple[Any]:
        import comfy.lora
        import comfy.sd

        loaded = ConceptBank.from_pretrained(bank)
        strengths = erased_set(loaded, erased)
        if not strengths:
            return (model,)
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        patches = model.get_key_patches("diffusion_model.")
        weights, linears = base_weights(loaded, keys, patches), door_linears(loaded, keys, patches)
        lora = erasing_lora(loaded, strengths, weights, linears)
        return (comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0],)


def erased_set(bank: ConceptBank, text: str) -> dict[str, float]:
    """The erased set that a text box says, one concept a line, with what the bank's policy always erases.

    Raises:
        ValueError: On a concept that the bank lacks, or a bad strength.
    """
    strengths = dict.fromkeys(bank.always, 1.0)
    for line in filter(None, map(str.strip, text.splitlines())):
        name, sign, strength = line.rpartition("=")
        try:
            strengths[name.strip() if sign else line] = float(strength) if sign else 1.0
        except ValueError as error:
            raise ValueError(f"{line!r} is not understood; write a concept, or: concept = strength") from error
    return strengths_of(bank, strengths) if strengths else {}


def base_weights(bank: ConceptBank, keys: Mapping[str, str], patches: Mapping[str, Any]) -> dict[str, Tensor]:
    """W_m by module name, as they were before any LoRA.

    Args:
        bank: Says which modules, if it has per-module increments. Text-side ones act on whatever reads the text.
        keys: ComfyUI's {LoRA key: weight key}.
        patches: ComfyUI's {weight key: [the weight as loaded, its patches ...]}.

    Raises:
        ValueError: If the model lacks one of the bank's modules.
    """
    modules: Iterable[str] = bank.base.projections if has_per_module(bank) else _text_projections(keys)
    if not modules:
        raise ValueError(f"the bank is for {bank.base.name!r}; this model has no attn2.to_k and attn2.to_v")
    return _weights(bank, modules, keys, patches)


def door_linears(
    bank: ConceptBank, keys: Mapping[str, str], patches: Mapping[str, Any]
) -> dict[str, tuple[str, Tensor]]:
    """The Linear that reads each of the bank's further doors, with its weight; arguments as of `base_weights`.

    Raises:
        ValueError: If the model lacks one of them.
    """
    modules = {door.name: door.linear for door in UNET.doors if door.name in bank.base.doors and door.linear}
    weights = _weights(bank, modules.values(), keys, patches)
    return {door: (module, weights[module]) for door, module in modules.items()}


def _text_projections(keys: Mapping[str, str]) -> list[str]:
    """The modules that read the text, each under one of the names that ComfyUI has for it."""
    names = {weight: key.removeprefix(_PREFIX) for key, weight in keys.items() if _READS_TEXT.fullmatch(key)}
    return list(names.values())


def _weights(
    bank: ConceptBank, modules: Iterable[str], keys: Mapping[str, str], patches: Mapping[str, Any]
) -> dict[str, Tensor]:
    found = {name: keys.get(_PREFIX + name.replace(".", "_")) for name in modules}
    if missing := [name for name, key in found.items() if key not in patches]:
        raise ValueError(f"the bank is for {bank.base.name!r}; this model has no {missing[:3]}")
    originals = {name: patches[key][0] for name, key in found.items()}
    # Since 2024 ComfyUI gives the weight together with the function that makes it usable.
    return {name: first[0] if isinstance(first, tuple) else first for name, first in originals.items()}


def erasing_lora(
    bank: ConceptBank,
    strengths: Mapping[str, float],
    weights: Mapping[str, Tensor],
    linears: Mapping[str, tuple[str, Tensor]],
) -> dict[str, Tensor]:
    """The erased set as one LoRA, to be applied at strength 1.

    Raises:
        ValueError: If the bank was made for another base, or acts at a door that none of the Linears reads.
    """
    refuse_other_weights(bank, weights)
    return kohya_tensors(merged_factors(bank, strengths, weights, linears))


NODE_CLASS_MAPPINGS = {"SepMEEraseConcepts": EraseConcepts}
NODE_DISPLAY_NAME_MAPPINGS = {"SepMEEraseConcepts": "Erase concepts (SepME)"}
