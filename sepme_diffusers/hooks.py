"""Increments in force on a denoiser, through torch's own forward hooks.

    y = W_m e + ((e Aᵀ) ⊙ mask) C_mᵀ

The mask holds the strengths of the active increments, in one row for a whole batch or one row a prompt.

Hooks, not PEFT adapters: `set_adapters`, `load_lora_weights` or `unload_lora_weights` of something unrelated must
never switch an erasure off. The state lives on the denoiser, so pipelines that share it share what is erased.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sepme_diffusers.increment import Increment
from sepme_diffusers.targets import cross_attentions, projection_weights, text_projections

if TYPE_CHECKING:
    from sepme_diffusers.bank import ConceptBank

_ATTRIBUTE = "_sepme_erasures"


class ErasureNotInForce(RuntimeError):
    """An erasure that was asked for cannot be shown to be in force; nothing was generated."""


class Erasures:
    """The increments that a denoiser has loaded, and which of them are active.

    Args:
        denoiser: The UNet; hooks are registered on its text projections at once.
        bank: Where the increments come from, for every pipeline that shares the denoiser.
    """

    def __init__(self, denoiser: nn.Module, bank: ConceptBank | None = None) -> None:
        self.bank = bank
        self._bases: dict[str, Tensor] = {}
        self._coefficients: dict[str, dict[str, Tensor]] = {}
        self._strengths: dict[str, float] = {}
        self._stacks: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
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
        self._stack([strengths])
        self._strengths = {name: float(strengths[name]) for name in self._bases if name in strengths}

    @contextmanager
    def temporarily(self, rows: Sequence[Mapping[str, float]]) -> Iterator[None]:
        """While the block runs, row i of a batch has the increments of rows[i]; one row stands for all.

        Afterwards, whatever happened, what `activate` said last is in force again.

        Raises:
            KeyError: If one is not loaded; nothing changes then.
        """
        self._stack(rows)
        try:
            yield
        finally:
            self._stack([self._strengths])

    def _stack(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Stack the factors of every increment that some row has, with the rows' strengths as the mask."""
        asked = {name for strengths in rows for name in strengths}
        if unknown := sorted(asked - set(self._bases)):
            raise KeyError(f"not loaded: {unknown}; loaded: {sorted(self._bases)}")
        names = [name for name in self._bases if name in asked]
        stacks = {}
        if names:
            ranks = torch.tensor([len(self._bases[name]) for name in names])
            strengths = torch.tensor([[float(row.get(name, 0.0)) for name in names] for row in rows])
            mask = strengths.repeat_interleave(ranks, dim=1)[:, None]
            for module in self._handles:
                c = torch.cat([self._coefficients[name][module] for name in names], dim=1)
                a = torch.cat([self._bases[name].to(c.device) for name in names])
                stacks[module] = (a, c, mask.to(c.device))
        self._stacks = stacks

    def _hook(self, name: str) -> Any:
        def add_increments(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._stacks:
                return None
            if self._stacks[name][0].device != output.device:
                self._stacks[name] = tuple(part.to(output.device) for part in self._stacks[name])
            a, c, mask = self._stacks[name]
            # In float32 whatever the model's precision: a guarded token must meet A at full precision.
            with torch.autocast(output.device.type, enabled=False):
                change = ((inputs[0].float() @ a.T) * self._for_batch(mask, len(output))) @ c.T
            return output + change.to(output.dtype)

        add_increments.erasures = self
        return add_increments

    @staticmethod
    def _for_batch(mask: Tensor, batch: int) -> Tensor:
        """The mask (rows, 1, R) for a batch that holds the rows once or several times over (guidance)."""
        if len(mask) == 1 or len(mask) == batch:
            return mask
        if batch % len(mask):
            raise ErasureNotInForce(
                f"the UNet was given a batch of {batch}, which is no multiple of the {len(mask)} erased sets asked for"
            )
        return mask.repeat(batch // len(mask), 1, 1)

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
