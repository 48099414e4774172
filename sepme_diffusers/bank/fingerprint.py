"""Fingerprint: what tells one base from another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

# A cast or a fused LoRA changes a weight's norm by less than this share, another checkpoint by more.
_SAME_NORM = 1e-2


@dataclass(frozen=True)
class Fingerprint:
    """What tells one base from another. What is None was not looked at, and is not compared.

    Args:
        width: d of the text embedding.
        doors: {door name: width} of further doors. Doors that one of two bases does not name are not compared.
        n_tokens: Tokens of a prompt.
        projections: {module name: (d_out, Frobenius norm of W_m)} of the text projections.

    Example:
        >>> Fingerprint(768).differs(Fingerprint(1024))
        'embeddings are 768 wide, not 1024'
    """

    width: int
    doors: Mapping[str, int] = field(default_factory=dict)
    n_tokens: int | None = None
    projections: Mapping[str, tuple[int, float]] | None = None

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor]) -> Fingerprint:
        """Take the fingerprint of text projections W_m (d_out, d) by module name, at least one."""
        return cls(next(iter(weights.values())).shape[1], projections=heights_and_norms(weights))

    @property
    def text_side(self) -> Fingerprint:
        """What of it matters to text-side increments, which serve every base with the same text encoder."""
        return replace(self, projections=None)

    def differs(self, other: Fingerprint) -> str:
        """Say why the other is another base; empty if it is not, as far as both tell."""
        if self.width != other.width:
            return f"embeddings are {self.width} wide, not {other.width}"
        both = sorted(self.doors.keys() & other.doors.keys())
        if wrong := [name for name in both if self.doors[name] != other.doors[name]]:
            return f"further doors have other widths: {_some(wrong)}"
        if None not in (self.n_tokens, other.n_tokens) and self.n_tokens != other.n_tokens:
            return f"prompts have {self.n_tokens} tokens, not {other.n_tokens}"
        if self.projections is None or other.projections is None:
            return ""
        return _differing(self.projections, other.projections)


def heights_and_norms(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, float]]:
    """Return {module name: (d_out, Frobenius norm)} of weights W_m (d_out, d)."""
    return {name: (len(weight), float(weight.float().norm())) for name, weight in weights.items()}


def _differing(mine: Mapping[str, tuple[int, float]], theirs: Mapping[str, tuple[int, float]]) -> str:
    if lacking := sorted(mine.keys() ^ theirs.keys()):
        return f"only one has the text projections {_some(lacking)}"
    if heights := [name for name, (d_out, _) in mine.items() if d_out != theirs[name][0]]:
        return f"text projections have other heights: {_some(heights)}"
    norms = [name for name, (_, n) in mine.items() if not math.isclose(n, theirs[name][1], rel_tol=_SAME_NORM)]
    return f"text projections have other weights: {_some(norms)}" if norms else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
