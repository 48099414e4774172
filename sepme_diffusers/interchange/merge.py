"""An erased set of a bank as one change of a base's weights: what every export writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from diffusers import DiffusionPipeline
from diffusers.utils import logging
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import refuse_other_text, refuse_other_weights
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.doors.registry import door_linears
from sepme_diffusers.increment.merging import merged
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
    """Sum increments into one change of each weight, see `increment.merging.merged`.

    The sum has no gates, as no LoRA and no fused weight can hold one: it acts on every prompt in proportion to what it
    reads. It erases what was asked for, and moves regular prompts more than with the gates. A warning says so.

    Args:
        bank: Where the increments come from.
        strengths: {name: strength}, see `strengths_of`.
        weights: W_m by module name.
        linears: {door: (module name, weight)}, see `doors.registry.door_linears`.

    Raises:
        ValueError: If an increment does not fit the weights, or acts at a door that no Linear reads.
    """
    if lost := gates_lost(bank, strengths):
        logger.warning(lost)
    return merged([(bank[name].increment, strength) for name, strength in strengths.items()], weights, linears)


def gates_lost(bank: ConceptBank, names: Iterable[str]) -> str:
    """Say that these concepts have gates, which no export can hold; empty if they have none."""
    gated = [name for name in names if bank.entries.outline(name).gates]
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
