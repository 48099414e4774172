"""Increment: one erasure, as factors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from sepme_diffusers.algebra.rounding import coarseness

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DOOR = re.compile(r"[a-z][a-z0-9_]{0,99}")


@dataclass(frozen=True, eq=False)
class Increment:
    """ΔW_m = C_m A for every edited module m, kept as factors.

    Args:
        A: The basis, (r, d), frozen and shared by all modules; its rows lie in the guard's null space.
        B: Text-side form, (d, r): C_m = W_m B for every module, an edit e <- e + (e Aᵀ) Bᵀ of the embedding that the
            edited modules see. No base weight enters it: it serves every base with the same text encoder.
        C: Per-module form, {module name: (d_out, r)}.
        gate: The increment acts on a prompt only if it reads at least this in one of its tokens e, ‖e Aᵀ‖; see
            `reading`. Default: it acts on every prompt, in proportion to what it reads.
        doors: What the increment does at further doors of the denoiser, by door name: text-side increments of their
            own, of any width. SDXL's pooled embedding is such a door.

    Raises:
        ValueError: If not exactly one of B and C is given, shapes do not fit, the gate is not a number above zero, a
            number is not finite or of an unusual type, or a further door has an unusable name, a per-module increment
            or doors of its own.

    Example:
        >>> a, b, pooled = torch.ones(1, 4), torch.ones(4, 1), torch.ones(1, 6)
        >>> list(Increment(a, b, doors={"pooled": Increment(pooled, pooled.T)}).tensors())
        ['A', 'B', 'pooled.A', 'pooled.B']
    """

    A: Tensor
    B: Tensor | None = None
    C: Mapping[str, Tensor] | None = None
    gate: float | None = None
    doors: Mapping[str, Increment] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "doors", dict(self.doors))
        if self.gate is not None and not 0 < self.gate < math.inf:
            raise ValueError(f"the gate of an increment is a finite number above zero, or None, not {self.gate!r}")
        if (self.B is None) == (self.C is None) or self.C == {}:
            raise ValueError("an increment has either B (text-side) or C (per-module), and C is not empty")
        own = self._own_tensors()
        faults = [f"{name} {tuple(t.shape)}" for name, t in own.items() if not self._fits(name, t)]
        if faults:
            raise ValueError(f"an increment with A of shape {tuple(self.A.shape)} cannot hold: {', '.join(faults)}")
        if strange := {name: str(t.dtype) for name, t in own.items() if t.dtype not in _DTYPES}:
            raise ValueError(f"an increment is of 16, 32 or 64 bit floating point numbers, not {strange}")
        if infinite := [name for name, tensor in own.items() if not _is_finite(tensor)]:
            raise ValueError(f"an increment must be finite; NaN or Inf in {infinite}")
        self._refuse_doors()

    def _refuse_doors(self) -> None:
        if unusable := [name for name in self.doors if not _DOOR.fullmatch(name)]:
            raise ValueError(f"a door's name has lower-case letters, digits and underscores only, not {unusable}")
        if wrong := [name for name, increment in self.doors.items() if increment.form != "text"]:
            raise ValueError(f"what an increment does at a further door is text-side; these are per-module: {wrong}")
        if nested := [name for name, increment in self.doors.items() if increment.doors]:
            raise ValueError(f"what an increment does at a further door has no doors of its own; these have: {nested}")
        if taken := sorted(self._own_tensors().keys() & self._tensors_of_doors().keys()):
            raise ValueError(f"tensors of further doors are named like modules: {taken}")

    def _fits(self, name: str, tensor: Tensor) -> bool:
        if tensor.ndim != 2 or self.A.ndim != 2 or 0 in tensor.shape:
            return False
        if name == "B":
            return tensor.shape == self.A.shape[::-1]
        return name == "A" or tensor.shape[1] == self.A.shape[0]

    @property
    def form(self) -> Literal["text", "module"]:
        """Which of the two forms this is."""
        return "module" if self.B is None else "text"

    @property
    def rank(self) -> int:
        """r, the rows of A."""
        return self.A.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Every factor by name: "A" with "B" or with the module names, then "<door>.A" and "<door>.B"."""
        return self._own_tensors() | self._tensors_of_doors()

    def _own_tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, **({} if self.B is None else {"B": self.B}), **(self.C or {})}

    def _tensors_of_doors(self) -> dict[str, Tensor]:
        return {
            f"{door}.{name}": tensor
            for door, increment in self.doors.items()
            for name, tensor in increment.tensors().items()
        }

    def coefficients(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute C_m (d_out, r) for each module, float32, on the weights' device.

        Args:
            weights: W_m (d_out, d) by module name, see `doors.linears.projection_weights`.

        Raises:
            ValueError: If the base's modules or shapes are not those of the increment.
        """
        if self.B is not None:
            if wrong := {name: tuple(w.shape) for name, w in weights.items() if w.shape[1] != len(self.B)}:
                raise ValueError(
                    f"the increment edits embeddings of width {len(self.B)}; these modules differ: {wrong}"
                )
            return {name: weight.float() @ self.B.to(weight.device).float() for name, weight in weights.items()}
        self.refuse_other_modules(weights)
        own = self.C or {}
        return {name: own[name].to(weight.device).float() for name, weight in weights.items()}

    def refuse_other_modules(self, weights: Mapping[str, Tensor]) -> None:
        """Check that a per-module increment has the modules and shapes of a base.

        Raises:
            ValueError: If not, with what differs.
        """
        own = self.C or {}
        if set(own) != set(weights):
            missing, unknown = sorted(set(weights) - set(own)), sorted(set(own) - set(weights))
            raise ValueError(f"the increment was made for another base: it lacks {missing} and has unknown {unknown}")
        shapes = {module: (len(own[module]), self.A.shape[1]) for module in weights}
        if wrong := {m: (shapes[m], tuple(w.shape)) for m, w in weights.items() if shapes[m] != w.shape}:
            raise ValueError(f"the increment was made for another base: shapes (increment, base) differ: {wrong}")

    def expand(self, weights: Mapping[str, Tensor]) -> Increment:
        """Bring the increment into per-module form; what it does at further doors stays as it is."""
        return replace(self, B=None, C=self.coefficients(weights))

    @property
    def is_compact(self) -> bool:
        """Whether A, too, is in half precision."""
        return self.A.dtype in (torch.float16, torch.bfloat16)

    @property
    def coarseness(self) -> float:
        """The relative rounding step of A where that is coarser than float32's, else 0."""
        return coarseness(self.A.dtype)

    def compact(self) -> Increment:
        """Bring the increment into float16, A and further doors included, scaled so that A's longest row has length 1.

        What rounding A lets through of a guard is set to zero at inference, so that guards hold to the bit all the
        same; an export moves them by what was rounded, some 1e-4 of their projections.

        Raises:
            ValueError: If a number is too large for float16.
        """
        scale = float(self.A.double().norm(dim=1).max())
        b = None if self.B is None else (scale * self.B.double()).half()
        c = None if self.C is None else {name: (scale * factor.double()).half() for name, factor in self.C.items()}
        gate = None if self.gate is None else self.gate / scale
        doors = {name: increment.compact() for name, increment in self.doors.items()}
        return Increment((self.A.double() / scale).half(), b, c, gate, doors)

    def reading(self, tokens: Tensor) -> Tensor:
        """Compute max_t ‖e_t Aᵀ‖ of each prompt's tokens e_t (n_prompts, n_tokens, d): (n_prompts,), float64."""
        return (tokens.double() @ self.A.double().to(tokens.device).T).norm(dim=-1).amax(dim=-1)

    def gated(self, tokens: Tensor, share: float) -> Increment:
        """Set the gate at a share of the least that the increment reads in one of these prompts.

        Gates of further doors stay as they are.

        Args:
            tokens: Embeddings of prompts that it must act on, (n_prompts, n_tokens, d).
            share: Between 0 and 1.

        Raises:
            ValueError: If it reads nothing in one of them.
        """
        return replace(self, gate=share * float(self.reading(tokens).min()))

    def delta_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute ΔW_m = C_m A as dense matrices (d_out, d), float32."""
        return {name: c @ self.A.to(c.device).float() for name, c in self.coefficients(weights).items()}


def _is_finite(tensor: Tensor) -> bool:
    # Ten times as fast as to ask every number: the least and the largest are NaN where one number is.
    least, largest = torch.aminmax(tensor.detach())
    return math.isfinite(least) and math.isfinite(largest)
