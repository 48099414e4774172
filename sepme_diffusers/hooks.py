"""Increments in force on a denoiser, through torch's own forward hooks.

    y = W_m e + ((e Aᵀ) ⊙ strength) C_mᵀ

Hooks, not PEFT adapters: `set_adapters`, `load_lora_weights` or `unload_lora_weights` of something unrelated must
never switch an erasure off. The state lives on the denoiser, so pipelines that share it share what is erased.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sepme_diffusers.increment import Increment
from sepme_diffusers.targets import cross_attentions, projection_weights, text_projections

_ATTRIBUTE = "_sepme_erasures"


class ErasureNotInForce(RuntimeError):
    """An erasure that was asked for cannot be shown to be in force; nothing was generated."""


class Erasures:
    """The increments that a denoiser has loaded, and which of them are active.

    Args:
        denoiser: The UNet; hooks are registered on its text projections at once.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._bases: dict[str, Tensor] = {}
        self._coefficients: dict[str, dict[str, Tensor]] = {}
        self._strengths: dict[str, float] = {}
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles = {
            name: getattr(module, "base_layer", module).register_forward_hook(self._hook(name))
            for name, module in text_projections(denoiser).items()
        }
        setattr(denoiser, _ATTRIBUTE, self)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the loaded increments, in the order in which they are always added up."""
        return tuple(self._bases)

    @property
    def active(self) -> dict[str, float]:
        """Strength of each active increment."""
        return dict(self._strengths)

    def load(self, increments: Mapping[str, Increment], denoiser: nn.Module) -> None:
        """Make increments available; all or none. Erases nothing."""
        weights = {name: weight.detach() for name, weight in projection_weights(denoiser).items()}
        coefficients = {name: increment.coefficients(weights) for name, increment in increments.items()}
        self._bases |= {name: increment.A.float() for name, increment in increments.items()}
        self._coefficients |= coefficients

    def activate(self, strengths: Mapping[str, float]) -> None:
        """Make exactly these increments active. One canonical order of summation: no trace of earlier calls.

        Raises:
            KeyError: If one is not loaded; nothing changes then.
        """
        if unknown := sorted(set(strengths) - set(self._bases)):
            raise KeyError(f"not loaded: {unknown}; loaded: {sorted(self._bases)}")
        chosen = {name: float(strengths[name]) for name in self._bases if name in strengths}
        self._stacks = self._stack(chosen) if chosen else {}
        self._strengths = chosen

    def _stack(self, strengths: Mapping[str, float]) -> dict[str, tuple[Tensor, Tensor]]:
        stacks = {}
        for module in self._handles:
            c = torch.cat([self._coefficients[name][module] * strength for name, strength in strengths.items()], dim=1)
            a = torch.cat([self._bases[name].to(c.device) for name in strengths])
            stacks[module] = (a.contiguous(), c.contiguous())
        return stacks

    def _hook(self, name: str) -> Any:
        def add_increments(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._stacks:
                return None
            a, c = self._stacks[name]
            if a.device != output.device:
                a, c = self._stacks[name] = a.to(output.device), c.to(output.device)
            # In float32 whatever the model's precision: a guarded token must meet A at full precision.
            with torch.autocast(output.device.type, enabled=False):
                change = (inputs[0].float() @ a.T) @ c.T
            return output + change.to(output.dtype)

        add_increments.erasures = self
        return add_increments

    def missing_from(self, denoiser: nn.Module) -> list[str]:
        """Text projections of the denoiser on which these erasures would not act."""
        missing = []
        for name, module in text_projections(denoiser).items():
            hooks = getattr(module, "base_layer", module)._forward_hooks.values()
            if not any(getattr(hook, "erasures", None) is self for hook in hooks):
                missing.append(name)
        # Processors of fuse_qkv_projections() read one fused weight and never call the modules.
        fused = [
            name for name, module in cross_attentions(denoiser).items() if "Fused" in type(module.processor).__name__
        ]
        return missing + fused

    def remove(self, denoiser: nn.Module) -> None:
        """Take every hook away: the denoiser is as it was before, bit for bit."""
        for handle in self._handles.values():
            handle.remove()
        delattr(denoiser, _ATTRIBUTE)


def erasures_of(denoiser: nn.Module) -> Erasures | None:
    """What is loaded on a denoiser, or None."""
    return getattr(denoiser, _ATTRIBUTE, None)
