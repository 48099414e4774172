"""Whether what is erased acts on a pipeline: looked at before a call, and again after its last step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

from sepme_diffusers.algebra.rounding import rounding_share
from sepme_diffusers.bank.compatibility import refuse_other_weights
from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.doors.linears import linear_of, projection_weights, text_projections
from sepme_diffusers.doors.registry import denoisers_of, drawing_denoisers, is_helper
from sepme_diffusers.runtime.calls import Call
from sepme_diffusers.runtime.erased_sets import Key
from sepme_diffusers.runtime.erasures import Erasures
from sepme_diffusers.runtime.helpers import check_helpers
from sepme_diffusers.runtime.samples import samples
from sepme_diffusers.runtime.snapshot import Snapshot
from sepme_diffusers.runtime.text_check import TextCheck
from sepme_diffusers.text.encoders import text_encoders

logger = logging.get_logger(__name__)


def check_before(
    pipe: Any,
    erasures: Erasures,
    snapshot: Snapshot,
    keys: Iterable[Key],
    text_check: TextCheck,
    encode_settings: Mapping[str, Any],
) -> float:
    """Check that concepts, if erased in a call that begins now, would act; return what a reading must exceed to count.

    Args:
        pipe: The pipeline.
        erasures: What is loaded on its denoisers.
        snapshot: What the call begins with.
        keys: The concepts.
        text_check: Of the snapshot's banks.
        encode_settings: Of the pipeline's `encode_prompt`, as the call has them.

    Raises:
        ErasureNotInForce: If they would not, with the reason.
    """
    keys = list(keys)
    if not keys:
        return 0.0
    drawing, helpers = list(drawing_denoisers(pipe).values()), _helpers(pipe)
    erasures.renew()
    erasures.check(drawing)
    per_module = [key for key in keys if snapshot.increment(key).form == "module"]
    if per_module:
        _refuse_changed_weights(erasures, snapshot, frozenset(bank for bank, _ in per_module))
    erasures.helpers.follow(helpers)
    if helpers and per_module:
        logger.warning(
            "per-module increments act on the UNet alone: %s go on reading the unedited prompt. Text-side increments "
            "(solver='closed_form') act on both",
            [type(helper).__name__ for helper in helpers],
        )
    if not text_encoders(pipe):
        return 0.0
    least = text_check.least(pipe, keys, **encode_settings)
    _refuse_rounded_away(pipe, snapshot, keys, least)
    return least


def check_after(pipe: Any, erasures: Erasures, call: Call) -> None:
    """Check, after the last step, that the hooks were there for all of the call.

    Raises:
        ErasureNotInForce: If no denoiser ran for the call, or hooks are gone, or a denoiser was replaced.
    """
    if not call.ran:
        raise ErasureNotInForce(
            "no pass of the denoiser was seen in this call: it ran elsewhere, or its hooks were removed. A thread "
            "that runs the denoiser for a call must open its record: call = current_call(), `with call:` there"
        )
    erasures.check(drawing_denoisers(pipe).values())
    if call.active is not None and call.active.doors:
        check_helpers(call, _helpers(pipe))


def _helpers(pipe: Any) -> list[nn.Module]:
    """The denoisers that help the others (ControlNets)."""
    return [module for module in denoisers_of(pipe).values() if is_helper(module)]


def _refuse_changed_weights(erasures: Erasures, snapshot: Snapshot, banks: frozenset[str]) -> None:
    """Check that per-module increments of these banks fit the weights; weights that were checked are known again."""
    denoisers = [attachment.denoiser for attachment in erasures.attachments]
    linears = [linear_of(module) for denoiser in denoisers for module in text_projections(denoiser).values()]
    state = snapshot.stacks, banks, samples(linear.weight for linear in linears)
    offloaded = any(linear.weight.is_meta for linear in linears)
    if state == erasures.checked_weights and not offloaded:
        return
    for denoiser in denoisers:
        weights = projection_weights(denoiser)
        for bank in banks:
            try:
                refuse_other_weights(snapshot.banks[bank], weights)
            except ValueError as error:
                raise ErasureNotInForce(f"the weights are no longer those that it was loaded on: {error}") from error
    erasures.checked_weights = state


def _refuse_rounded_away(pipe: Any, snapshot: Snapshot, keys: Iterable[Key], least: float) -> None:
    """Check that increments read more of their concepts than rounding takes away at this precision."""
    dtype: torch.dtype = next(text_encoders(pipe)[0].parameters()).dtype
    for bank, concept in keys:
        entry = snapshot.banks[bank][concept]
        reach, d = entry.metrics.get("reach"), entry.increment.A.shape[1]
        lost = max(least, rounding_share(d, torch.finfo(dtype).eps + entry.increment.coarseness))
        if isinstance(reach, float) and reach <= lost:
            raise ErasureNotInForce(
                f"the increment of {snapshot.names.shown[bank, concept]!r} reads {reach:.1e} of its concept, and "
                f"{dtype} embeddings are exact to {lost:.1e}: use float32, or make it again with fewer guards"
            )
