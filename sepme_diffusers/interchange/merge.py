"""An erased set of a bank as one change of a base's weights: what every export writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn
from torch.nn.functional import pad

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import refuse_other_text, refuse_other_weights
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.doors.registry import door_linears
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.peft_form import Factors
from sepme_diffusers.runtime.erased_sets import Names

logger = logging.get_logger(__name__)

Erased = Iterable[str] | Mapping[str, float]


def strengths_of(bank: ConceptBank, erased: Erased) -> dict[str, float]:
    """Read an erased set as `set_erased` does, as {name: strength} in the bank's order.

    Raises:
        TypeError: If a single string is given.
        ValueError: If it is empty, names what the bank lacks, has a strength that is not a finite number above zero,
            or leaves out what the policy always erases.
    """
    strengths = {concept: strength for (_, concept), strength in Names({"bank": bank}).strengths(erased).items()}
    if not strengths:
        raise ValueError(f"nothing to export: the erased set is empty; the bank has {list(bank)}")
    bank.obey_policy(strengths)
    return {name: strengths[name] for name in bank if name in strengths}


def merged_changes(bank: ConceptBank, unet: nn.Module, strengths: Mapping[str, float]) -> Factors:
    """Sum increments into one change of each weight of a UNet, see `merged_factors`."""
    return merged_factors(bank, strengths, projection_weights(unet), door_linears(unet))


def merged_factors(
    bank: ConceptBank,
    strengths: Mapping[str, float],
    weights: Mapping[str, Tensor],
    linears: Mapping[str, tuple[str, Tensor]],
) -> Factors:
    """Sum increments into one change of each weight, on the CPU: ranks side by side, strengths in C.

    An edit at a further door becomes a change of the Linear that reads its embedding, in the columns that do.

    The sum has no gates, as no LoRA and no fused weight can hold one: it acts on every prompt in proportion to what it
    reads. It erases what was asked for, and moves regular prompts more than with the gates. A warning says so.

    Args:
        bank: Where the increments come from.
        strengths: {name: strength}, see `strengths_of`.
        weights: W_m by module name.
        linears: {door: (module name, weight)}, see `doors.registry.door_linears`.

    Returns:
        Factors of one rank, the largest, filled up with zeros: readers of LoRA files differ in what they make of
        several ranks.

    Raises:
        ValueError: If an increment does not fit the weights, or acts at a door that no Linear reads.
    """
    if lost := gates_lost(bank, strengths):
        logger.warning(lost)
    parts = [(bank[name].increment, strength) for name, strength in strengths.items()]
    a = _side_by_side(increment for increment, _ in parts)
    coefficients = [(increment.coefficients(weights), strength) for increment, strength in parts]
    factors = {
        module: (a, torch.cat([strength * c[module].cpu() for c, strength in coefficients], dim=1))
        for module in weights
    }
    for door in dict.fromkeys(door for increment, _ in parts for door in increment.doors):
        if door not in linears:
            raise ValueError(
                f"increments act at the door {door!r}, and no Linear of this base is known to read it: they cannot be "
                "written as a change of weights"
            )
        module, weight = linears[door]
        factors[module] = _at_linear([(i.doors[door], s) for i, s in parts if door in i.doors], weight)
    return _of_one_rank(factors)


def _at_linear(parts: Sequence[tuple[Increment, float]], weight: Tensor) -> tuple[Tensor, Tensor]:
    """The change [W B A, 0] of a weight [W, ...] whose first columns read the embedding."""
    a = _side_by_side(increment for increment, _ in parts)
    others = weight.shape[1] - a.shape[1]
    if others < 0:
        raise ValueError(f"another base: the embedding at a further door is {a.shape[1]} wide, not {weight.shape[1]}")
    w = weight[:, : a.shape[1]]
    c = [strength * increment.coefficients({"": w})[""].cpu() for increment, strength in parts]
    return pad(a, (0, others)), torch.cat(c, dim=1)


def _side_by_side(increments: Iterable[Increment]) -> Tensor:
    return torch.cat([increment.A.float().cpu() for increment in increments])


def _of_one_rank(factors: Factors) -> Factors:
    rank = max(len(a) for a, _ in factors.values())
    return {
        module: (pad(a, (0, 0, 0, rank - len(a))), pad(c, (0, rank - len(a)))) for module, (a, c) in factors.items()
    }


def gates_lost(bank: ConceptBank, names: Iterable[str]) -> str:
    """Say that these concepts have gates, which no export can hold; empty if they have none."""
    gated = [name for name in names if _is_gated(bank[name].increment)]
    if not gated:
        return ""
    return (
        f"the gates of {gated} are lost: what is exported acts on every prompt in proportion to what it reads. It "
        "erases at least as much, and regular prompts move more than under this package"
    )


def _is_gated(increment: Increment) -> bool:
    return increment.gate is not None or any(_is_gated(part) for part in increment.doors.values())


def fitting_unet(bank: ConceptBank, pipe_or_unet: DiffusionPipeline | nn.Module) -> nn.Module:
    """Return the UNet itself, whatever `torch.compile` has wrapped around it, if the bank was made for it.

    Args:
        bank: The bank.
        pipe_or_unet: With a pipeline it is also checked that the bank fits the text encoders.

    Raises:
        ValueError: If the bank was made for another base, or the weights are offloaded.
    """
    unet = unwrap_module(getattr(pipe_or_unet, "unet", pipe_or_unet))
    if any(weight.is_meta for weight in unet.parameters()):
        raise ValueError("the UNet's weights are offloaded; load the pipeline without offloading to export from it")
    refuse_other_weights(bank, projection_weights(unet))
    if hasattr(pipe_or_unet, "unet"):
        refuse_other_text(pipe_or_unet, [bank])
    return unet
