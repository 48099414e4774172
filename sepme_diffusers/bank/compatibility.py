"""Whether a bank's increments fit a base: the shape and weights of its text projections, and its text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import BaseModel, has_exact_guard
from sepme_diffusers.bank.fingerprint import PROBES, Fingerprint
from sepme_diffusers.bank.guard_readings import GuardReadings, sampled
from sepme_diffusers.text.encoders import text_encoders
from sepme_diffusers.text.encoding import Encoded
from sepme_diffusers.text.names import some


def refuse_other_weights(bank: ConceptBank, weights: Mapping[str, Tensor]) -> None:
    """Check that a bank's increments fit the text projections of a base.

    Args:
        bank: The bank.
        weights: W_m (d_out, d) by module name, see `doors.linears.projection_weights`.

    Raises:
        ValueError: If they were made for another width, other modules, or other weights (per-module increments).
    """
    made_on, width = bank.base, next(iter(weights.values())).shape[1]
    if width != made_on.width:
        raise ValueError(
            f"the bank was made on {made_on.name!r}, and this is another base: embeddings are {made_on.width} wide, "
            f"not {width}"
        )
    if has_per_module(bank) and (reason := made_on.fingerprint.differs(Fingerprint.of_weights(weights))):
        raise ValueError(
            f"this UNet has other weights than {made_on.name!r}, for which its per-module increments were made: "
            f"{reason}. Text-side increments (solver='closed_form') serve every base with the same text encoders"
        )


def has_per_module(bank: ConceptBank) -> bool:
    """Tell whether a bank has increments that belong to the weights of one denoiser."""
    return any(outline.form == "module" for outline in bank.entries.outlines().values())


def refuse_other_base(bank: ConceptBank, base: BaseModel) -> None:
    """Check that per-module increments made on a base may join a bank, which would call them its own base's.

    Args:
        bank: The bank that they would join; it may hold text-side increments alone.
        base: What the increments are made on.

    Raises:
        ValueError: If the bank was made on another base.
    """
    if reason := bank.base.fingerprint.differs(base.fingerprint):
        raise ValueError(
            f"the bank was made on {bank.base.name!r}, and per-module increments of another base, {base.name!r}, "
            f"cannot join it: {reason}. Text-side increments (SepMETrainer with solver='closed_form' or "
            "parametrisation='text') may join a bank of any base with the same text encoders"
        )


def refuse_other_text(pipe: Any, banks: Iterable[ConceptBank]) -> None:
    """Check that the pipeline's text encoders are those that the banks were made with.

    Fingerprints are compared. Then guards of the increments, or of some of them in a bank of very many, are encoded.

    Raises:
        ValueError: If text becomes another embedding here, the increments read what their guards should hide from
            them, a concept leaves no guard by which this could be seen, there is no encoder to ask, or none for a door
            at which increments act.
    """
    banks = list(banks)
    if not text_encoders(pipe):
        raise ValueError(
            "the pipeline has no text encoder, so it cannot be seen whether the bank was made for its embeddings; "
            "load the bank first, then drop the encoder"
        )
    unknown = [name for bank in banks for name, o in bank.entries.outlines().items() if not has_exact_guard(o)]
    if unknown:
        raise ValueError(
            f"{some(unknown)}: no guard is exact (metrics.leakage_of lists those that are not), so it cannot be seen "
            "whether the bank was made for this pipeline's text encoder; make these concepts again with a guard that "
            "is exact"
        )
    # In one pass of the text encoder, for a load takes little else.
    readings, encoded = GuardReadings(sampled(dict(enumerate(banks)))), Encoded(pipe)
    encoded.prefetch([*PROBES, *readings.prompts])
    here = Fingerprint.of_text(pipe, encoded)
    for bank in banks:
        if reason := bank.base.fingerprint.differs(here):
            raise ValueError(
                f"the bank was made for another text encoder than this pipeline's, on {bank.base.name!r}: {reason}"
            )
    if foreign := readings.measure(pipe, encoded).foreign:
        raise ValueError(
            "the bank was made for another text encoder than this pipeline's: with this one its increments move "
            f"the prompts that they guard (share of the embedding that they read: {some(foreign.items())})"
        )
