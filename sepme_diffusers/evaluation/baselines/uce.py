"""Unified concept editing (UCE): all concepts erased by one fused edit in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.evaluation.baselines.baseline import Baseline
from sepme_diffusers.making.embedded import EmbeddedConcept
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import Encoded, encode, rows


def uce(
    pipe: Any, concepts: Sequence[Concept], preserved: Sequence[str], ridge: float = 0.1, preserve: float = 1.0
) -> dict[str, Tensor]:
    """Edit weights by unified concept editing, all concepts in one fused edit: {parameter name: weight}.

    The concepts take the values of their anchors, word by word, and the preserved prompts keep theirs:

        W ← W (Σ e* eᵀ + λ_p Σ p pᵀ + ε I) (Σ e eᵀ + λ_p Σ p pᵀ + ε I)⁻¹

    Args:
        pipe: The pipeline; only read.
        concepts: What to erase.
        preserved: Prompts p to keep. Their total weight is `preserve` times that of the concepts' prompts.
        ridge: ε.
        preserve: λ_p, before it is divided by the numbers of rows.

    Source: arXiv 2308.14761.
    """
    encoded = Encoded(pipe)
    described = [EmbeddedConcept.of(concept, encoded) for concept in concepts]
    edited = torch.cat([concept.rows for concept in described]).double()
    anchors = edited + torch.cat([concept.wanted_change for concept in described]).double()
    still = ridge * torch.eye(edited.shape[1], dtype=torch.float64, device=edited.device)
    if preserved:
        kept = rows(encode(pipe, preserved)).double()
        still = still + preserve * len(edited) / len(kept) * kept.T @ kept
    operator = torch.linalg.solve(edited.T @ edited + still, edited.T @ anchors + still)
    weights = projection_weights(pipe.unet)
    return {f"{name}.weight": (weight.double() @ operator.T).float() for name, weight in weights.items()}


UCE = Baseline(
    "UCE",
    "arXiv 2308.14761",
    uce,
    tuple({"ridge": ridge, "preserve": preserve} for ridge in (0.01, 0.1, 1.0) for preserve in (0.3, 1.0, 3.0)),
)
