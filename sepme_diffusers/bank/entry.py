"""What a bank holds: entries, what they were made on, and what is promised of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sepme_diffusers.bank.fingerprint import Fingerprint
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.concept import Concept

# What records of format versions 1 to 4 do not say, and what was so when they were made.
_BEFORE_VERSION_5 = {"steps_per_batch": 1}


@dataclass(frozen=True)
class Entry:
    """One erasure of a bank.

    Args:
        concept: What it erases.
        increment: How.
        config: The settings it was made with.
        guards: The prompts that it leaves as they were: exactly, but for those in `metrics["leakage_of"]`.
        metrics: Anything measured about it (steps, leakage ...), plain JSON values.
    """

    concept: Concept
    increment: Increment
    config: SepMEConfig
    guards: tuple[str, ...]
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exact_guards(self) -> tuple[str, ...]:
        """The guards that it claims to leave exactly as they were."""
        return tuple(guard for guard in self.guards if guard not in self.metrics.get("leakage_of", {}))


@dataclass(frozen=True)
class BaseModel:
    """What a bank was made on.

    Args:
        name: Id or folder of the base model.
        width: d of the text embedding.
        n_tokens: Tokens of a prompt.
        projections: {module name: (d_out, Frobenius norm of W_m)}, which tells one base's weights from another's.
        doors: {door name: width} of the further doors by which text enters the denoiser.
    """

    name: str
    width: int
    n_tokens: int
    projections: Mapping[str, tuple[int, float]]
    doors: Mapping[str, int] = field(default_factory=dict)

    @property
    def fingerprint(self) -> Fingerprint:
        """What tells this base from another."""
        return Fingerprint(self.width, self.doors, self.n_tokens, self.projections)


@dataclass(frozen=True)
class Guarantee:
    """What a bank promises for a guarded prompt.

    Args:
        exact: Its picture stays as it was whatever is erased; to the bit where guards were made at 1e-6.
        leakage: If not exact: the largest share ‖e ΔWᵀ‖ / ‖e Wᵀ‖ by which one increment moves it, measured when the
            increment was made.
        unaware: Concepts of the bank whose increments do not guard the prompt (made before it was known, say):
            nothing is promised while one of these is erased.
    """

    exact: bool
    leakage: float
    unaware: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """What a bank knows of the Hub repository that it came from, to notice what others push meanwhile. Immutable.

    Args:
        repository: Its id.
        always: The policy as it was pulled.
        entries: The entries as they were pulled or pushed. One that is another object now was changed since.
        records: {concept name: its record in the manifest on the Hub}, as last seen.
    """

    repository: str
    always: tuple[str, ...]
    entries: Mapping[str, Entry]
    records: Mapping[str, Any]


def base_model(manifest: Mapping[str, Any]) -> BaseModel:
    """Read what a manifest says of the base."""
    projections = {name: (d_out, norm) for name, (d_out, norm) in manifest["base"]["projections"].items()}
    return BaseModel(**{**manifest["base"], "projections": projections})


def entry_of(name: str, record: Mapping[str, Any], increment: Increment) -> Entry:
    """Make a concept's entry, from its record in the manifest and its increment.

    Raises:
        ValueError: If the record's settings or prompts are not usable.
    """
    concept = Concept.from_dict({"name": name, **record["concept"]})
    config = SepMEConfig.from_dict(_BEFORE_VERSION_5 | record["config"])
    return Entry(concept, increment, config, tuple(record["guards"]), record["metrics"])
