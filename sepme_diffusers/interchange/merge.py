"""An erased set of a bank as one increment for one base: what every export writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import refuse_other_text, refuse_other_weights
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.increment import Increment
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


def merged_increment(bank: ConceptBank, weights: Mapping[str, Tensor], strengths: Mapping[str, float]) -> Increment:
    """Sum increments into a single per-module one on the CPU: their ranks side by side, the strengths in C.

    The sum has no gates, as no LoRA and no fused weight can hold one: it acts on every prompt in proportion to what it
    reads. It erases what was asked for, and moves regular prompts more than with the gates. A warning says so.

    Args:
        bank: Where the increments come from.
        weights: W_m by module name.
        strengths: {name: strength}, see `strengths_of`.

    Raises:
        ValueError: If an increment does not fit the weights.
    """
    increments = {name: bank[name].increment for name in strengths}
    if lost := gates_lost(bank, strengths):
        logger.warning(lost)
    parts = [(strengths[name], increment.coefficients(weights)) for name, increment in increments.items()]
    c = {module: torch.cat([strength * c[module].cpu() for strength, c in parts], dim=1) for module in weights}
    return Increment(torch.cat([increment.A.float().cpu() for increment in increments.values()]), C=c)


def gates_lost(bank: ConceptBank, names: Iterable[str]) -> str:
    """Say that these concepts have gates, which no export can hold; empty if they have none."""
    gated = [name for name in names if bank[name].increment.gate is not None]
    if not gated:
        return ""
    return (
        f"the gates of {gated} are lost: what is exported acts on every prompt in proportion to what it reads. It "
        "erases at least as much, and regular prompts move more than under this package"
    )


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
