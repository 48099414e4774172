"""Increment: one erasure, as factors; and the same as a PEFT LoRA."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from peft import LoraConfig
from torch import Tensor

_PREFIX = "base_model.model."
# Below this leakage a guarded prompt's latents stay within 1e-4 of the original's.
_EXACT = 1e-5
# A reading this close below the gate may open it where embeddings are rounded in another way.
_MARGIN = 0.1
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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

    Raises:
        ValueError: If not exactly one of B and C is given, shapes do not fit, the gate is not a number above zero, or
            a number is not finite or of an unusual type.
    """

    A: Tensor
    B: Tensor | None = None
    C: Mapping[str, Tensor] | None = None
    gate: float | None = None

    def __post_init__(self) -> None:
        if self.gate is not None and not 0 < self.gate < math.inf:
            raise ValueError(f"the gate of an increment is a finite number above zero, or None, not {self.gate!r}")
        if (self.B is None) == (self.C is None) or self.C == {}:
            raise ValueError("an increment has either B (text-side) or C (per-module), and C is not empty")
        faults = [f"{name} {tuple(t.shape)}" for name, t in self.tensors().items() if not self._fits(name, t)]
        if faults:
            raise ValueError(f"an increment with A of shape {tuple(self.A.shape)} cannot hold: {', '.join(faults)}")
        if strange := {name: str(t.dtype) for name, t in self.tensors().items() if t.dtype not in _DTYPES}:
            raise ValueError(f"an increment is of 16, 32 or 64 bit floating point numbers, not {strange}")
        if infinite := [name for name, tensor in self.tensors().items() if not torch.isfinite(tensor).all()]:
            raise ValueError(f"an increment must be finite; NaN or Inf in {infinite}")

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
        """Every factor by name: "A" with "B", or "A" with the module names."""
        return {"A": self.A, "B": self.B} if self.C is None else {"A": self.A, **self.C}

    def coefficients(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """C_m (d_out, r) for each module, float32, on the weights' device.

        Args:
            weights: W_m (d_out, d) by module name, see `targets.projection_weights`.

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
        return {name: self.C[name].to(weight.device).float() for name, weight in weights.items()}

    def refuse_other_modules(self, weights: Mapping[str, Tensor]) -> None:
        """Check that a per-module increment has the modules and shapes of a base.

        Raises:
            ValueError: If not, with what differs.
        """
        if set(self.C) != set(weights):
            missing, unknown = sorted(set(weights) - set(self.C)), sorted(set(self.C) - set(weights))
            raise ValueError(f"the increment was made for another base: it lacks {missing} and has unknown {unknown}")
        shapes = {module: (len(self.C[module]), self.A.shape[1]) for module in weights}
        if wrong := {m: (shapes[m], tuple(w.shape)) for m, w in weights.items() if shapes[m] != w.shape}:
            raise ValueError(f"the increment was made for another base: shapes (increment, base) differ: {wrong}")

    def expand(self, weights: Mapping[str, Tensor]) -> Increment:
        """The same increment in per-module form."""
        return Increment(self.A, C=self.coefficients(weights), gate=self.gate)

    @property
    def is_compact(self) -> bool:
        """Whether A, too, is in half precision."""
        return self.A.dtype in (torch.float16, torch.bfloat16)

    @property
    def coarseness(self) -> float:
        """The relative rounding step of A where that is coarser than float32's, else 0."""
        return torch.finfo(self.A.dtype).eps if self.is_compact else 0.0

    def compact(self) -> Increment:
        """The same increment in float16, A included, scaled so that its longest row has length 1.

        What rounding A lets through of a guard is set to zero at inference, so that guards hold to the bit all the
        same; an export moves them by what was rounded, some 1e-4 of their projections.

        Raises:
            ValueError: If a number is too large for float16.
        """
        scale = float(self.A.double().norm(dim=1).max())
        b = None if self.B is None else (scale * self.B.double()).half()
        c = None if self.C is None else {name: (scale * factor.double()).half() for name, factor in self.C.items()}
        return Increment((self.A.double() / scale).half(), b, c, None if self.gate is None else self.gate / scale)

    def reading(self, tokens: Tensor) -> Tensor:
        """max_t ‖e_t Aᵀ‖ of each prompt's tokens e_t (n_prompts, n_tokens, d): (n_prompts,), float64."""
        return (tokens.double() @ self.A.double().to(tokens.device).T).norm(dim=-1).amax(dim=-1)

    def gated(self, tokens: Tensor, share: float) -> Increment:
        """The same increment with a gate at this share of what it reads in each of these prompts at least.

        Args:
            tokens: Embeddings of prompts that it must act on, (n_prompts, n_tokens, d).
            share: Between 0 and 1.

        Raises:
            ValueError: If it reads nothing in one of them.
        """
        return replace(self, gate=share * float(self.reading(tokens).min()))

    def delta_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """ΔW_m = C_m A as dense matrices (d_out, d), float32."""
        return {name: c @ self.A.to(c.device).float() for name, c in self.coefficients(weights).items()}

    def leakage(self, tokens: Tensor, weights: Mapping[str, Tensor], norms: Tensor | None = None) -> Tensor:
        """The largest ‖e ΔWᵀ‖ / ‖e Wᵀ‖ of a token e of each prompt, over all modules, (n_prompts,), float64.

        Zero for a prompt that leaves the gate shut, by a tenth of it at least: no rounding opens it elsewhere. What a
        compact A reads by its own rounding counts as zero, as at inference.

        Args:
            tokens: The prompts' embeddings, (n_prompts, n_tokens, d).
            weights: W_m (d_out, d) by module name.
            norms: ‖e Wᵀ‖, where `output_norms` has given them already.
        """
        norms = output_norms(tokens, weights) if norms is None else norms
        e, a = tokens.double(), self.A.double().to(tokens.device)
        read = e @ a.T
        if self.is_compact:
            least = rounding_share(a.shape[1], self.coarseness) * e.norm(dim=-1, keepdim=True) * a.norm(dim=1)
            read = read.masked_fill(read.abs() <= least, 0.0)
        if self.gate is not None:
            read = read * (self.reading(tokens) > (1 - _MARGIN) * self.gate)[:, None, None]
        shares = []
        for c, outputs in zip(self.coefficients(weights).values(), norms.unbind(-1), strict=True):
            # ‖C a‖² = aᵀ (CᵀC) a: by r numbers a token, not d_out.
            gram = c.double().T @ c.double()
            shares.append(((read @ gram) * read).sum(dim=-1).clamp(min=0).sqrt() / outputs)
        return torch.stack(shares).amax(dim=(0, 2)).cpu()

    def measured_leakage(
        self,
        guards: Sequence[str],
        tokens: Tensor,
        weights: Mapping[str, Tensor],
        damped: Collection[str] = (),
        norms: Tensor | None = None,
    ) -> dict[str, float | dict[str, float]]:
        """The metrics `leakage`, the largest, and `leakage_of`, that of each guard that is not left exactly alone.

        Args:
            guards: The prompts.
            tokens: Their embeddings, (n_prompts, n_tokens, d).
            weights: W_m (d_out, d) by module name.
            damped: Prompts that are not guarded exactly: they are listed however little they leak.
            norms: See `leakage`.
        """
        leaks = dict(zip(guards, self.leakage(tokens, weights, norms).tolist(), strict=True))
        moved = {prompt: _short(leak) for prompt, leak in leaks.items() if leak > _EXACT or prompt in damped}
        return {"leakage": _short(max(leaks.values()))} | ({"leakage_of": moved} if moved else {})

    def lora(self) -> tuple[dict[str, Tensor], LoraConfig]:
        """A per-module increment as the state dict and config of a PEFT LoRA, its scale being 1 (lora_alpha = r).

        A LoRA has no gate: it acts on every prompt, in proportion.

        Raises:
            ValueError: If the increment is text-side; `expand` it first.
        """
        if self.C is None:
            raise ValueError("a text-side increment is not a LoRA; expand it with the base's weights first")
        tensors = {}
        for name, c in self.C.items():
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = self.A.clone()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = c.contiguous()
        return tensors, LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=sorted(self.C), bias="none")

    @classmethod
    def from_lora(cls, tensors: Mapping[str, Tensor]) -> Increment:
        """The increment that `lora` wrote.

        Raises:
            ValueError: On keys that are not of such a LoRA, or if the modules do not share one A; lists them all.
        """
        down, up, unknown = {}, {}, []
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
        return cls(first, C=up)


def rounding_share(d: int, step: float) -> float:
    """What |e · a| / (‖e‖ ‖a‖) can be by rounding alone, of a dot product of d numbers rounded to a relative step."""
    return 3 * step / d**0.5


def output_norms(tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """‖e W_mᵀ‖ of each token e (n_prompts, n_tokens, d) for each module, (n_prompts, n_tokens, M), float64."""
    return torch.stack([(tokens.float() @ weight.float().T).norm(dim=-1).double() for weight in weights.values()], -1)


def _short(value: float) -> float:
    return float(f"{value:.3g}")
