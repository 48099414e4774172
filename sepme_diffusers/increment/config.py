"""SepMEConfig: everything that decides how an erasure is made. It validates itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

Solver = Literal["train", "closed_form", "closed_form+train"]
Basis = Literal["full", "aligned"]
Parametrisation = Literal["module", "text"]
Coupling = Literal["separate", "joint"]

CALIBRATED: Final = "calibrated"
"""The gate, or the weight of regular prompts, that is set by what prompts read."""

# Above zero and below one.
_Share = Annotated[float, Field(gt=0, lt=1)]


# Strict: 1.5, True and "16" are no ranks, and no setting of another name is passed over.
@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False, extra="forbid"))
class SepMEConfig:
    """How to make an increment; the defaults are tuned to work on every base model.

    Args:
        solver: "train" minimises the paper's correlation loss; "closed_form" solves for the increment directly;
            "closed_form+train" trains on from there.
        basis: For training. "full" is the paper's: the whole null space of the guard. "aligned" holds the `rank`
            directions that the closed form found, which carry the soft guards too.
        parametrisation: For training. "module" learns one C per module, "text" one B for all of them: a text-side
            increment, as the closed form gives, which serves every base with the same text encoder.
        coupling: For training. "separate" makes each increment alone; "joint" (the paper's †) makes those of one call
            together, their losses balanced.
        rank: Width of an aligned basis, and the rank of a closed-form increment.
        learning_rate: Adam's learning rate, for the coefficients.
        beta: Scale of the basis: an increment is w (beta S). With `relative`, the same value for every width of the
            basis and of the text embedding: the scale used is beta * (768 / width) ** 0.5.
        momentum: alpha of the momentum statistic L <- alpha L + (1 - alpha) L_cor, which takes in one loss per noisy
            batch. The default is the paper's 0.9 to the fourth power, for four steps on each batch.
        sparsity: Weight of the increments' mean absolute value (the paper's lambda).
        tolerance: tau. Training stops as soon as the momentum statistic falls to it; 0 is allowed.
        relative: Read `tolerance` as a share of the unedited correlation, and normalise `beta`.
        rescale: Scale what the stop rule stopped, once, so that its correlation on fresh noise is zero: the statistic
            follows the loss with a delay, so training goes too far.
        min_steps: Training never stops before this many steps.
        max_steps: Training always stops after this many steps.
        batch_size: Noisy pictures per step.
        steps_per_batch: Steps on each of these batches, for all of which the original model predicts once.
        n_images: Pictures x_0 that the original model makes of the concept beforehand.
        image_steps: Denoising steps for those pictures.
        guidance_scale: Guidance for those pictures.
        soft_guard_weight: What moving regular prompts costs, relative to moving the concept's own. "calibrated": the
            weight of several at which regular prompts read the least share of what the concept's own prompts read.
        gain: The share of the wanted change that a closed-form increment gives the concept's own prompts; the
            increment is scaled to it. Default: what the regression gives, which is less the more there is to guard.
        gate: An increment acts on a prompt only if it reads at least this share of what it reads in each of the
            concept's own prompts; no other prompt moves by a single bit. Default: no gate. The increment then acts on
            every prompt in proportion to what it reads, as a LoRA does. Exports have no gate in either case.
            "calibrated": between what regular prompts and what its own prompts read, see docs/training.md.
        adapter_soft_guard_weight: `soft_guard_weight` of the adapter that stands for a gated increment where there is
            no gate. Default: the largest of several at which its own prompts get 0.45 of the wanted change.
        ridge: What the norm of a closed-form increment costs, relative to the embedding's mean square.
        guard_tolerance: A direction belongs to the guard if its singular value exceeds this share of the largest.
        reserve: The share of the embedding's dimensions that guards must leave free. Where the names of the other
            concepts would take more, the first ones that fit are exact with a gate, none without; the rest is damped.
            Your own guards are always exact.
        name_weight: What moving a damped name costs, relative to moving the concept's own prompts.
        seed: Decides the pictures, the noise and the timesteps.

    Raises:
        ValueError: Listing every field that is out of range or of another type, with what was given.

    Source: arXiv 2402.05947 ("implementation details") for the paper's constants.
    """

    solver: Solver = "closed_form"
    basis: Basis = "aligned"
    parametrisation: Parametrisation = "module"
    coupling: Coupling = "separate"
    rank: PositiveInt = 1
    learning_rate: PositiveFloat = 0.1
    beta: PositiveFloat = 3e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.65
    sparsity: NonNegativeFloat = 1e-6
    tolerance: NonNegativeFloat = 0.02
    relative: bool = True
    rescale: bool = True
    min_steps: PositiveInt = 12
    max_steps: PositiveInt = 300
    batch_size: PositiveInt = 8
    steps_per_batch: PositiveInt = 4
    n_images: PositiveInt = 24
    image_steps: PositiveInt = 20
    guidance_scale: NonNegativeFloat = 4.0
    soft_guard_weight: NonNegativeFloat | Literal["calibrated"] = CALIBRATED
    gain: PositiveFloat | None = 0.8
    gate: _Share | Literal["calibrated"] | None = CALIBRATED
    adapter_soft_guard_weight: NonNegativeFloat | None = None
    ridge: PositiveFloat = 1e-5
    guard_tolerance: _Share = 1e-6
    reserve: _Share = 0.25
    name_weight: NonNegativeFloat = 0.25
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _refuse_steps_out_of_order(self) -> SepMEConfig:
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps ({self.min_steps}) must not exceed max_steps ({self.max_steps})")
        return self

    @classmethod
    def paper(cls, **changes: Any) -> SepMEConfig:
        """Give the paper's constants.

        Full basis, Adam at 0.1, beta 1e-4, lambda 1e-6, tau 1e-4; 12 to 1000 steps of one picture with noise of its
        own; 1000 pictures of 100 steps at guidance 7.5; and room for the exact guards of its scenes.

        Args:
            changes: What is to differ. A thousand pictures of a hundred steps are hours without a GPU: take fewer.
        """
        constants: dict[str, Any] = {
            "solver": "train", "basis": "full", "gate": None, "soft_guard_weight": 0.0, "learning_rate": 0.1,
            "beta": 1e-4, "momentum": 0.9, "sparsity": 1e-6, "tolerance": 1e-4, "relative": False, "rescale": False,
            "min_steps": 12, "max_steps": 1000, "steps_per_batch": 1, "batch_size": 1, "n_images": 1000,
            "image_steps": 100, "guidance_scale": 7.5, "reserve": 0.01,
        }  # fmt: skip
        return cls(**(constants | changes))

    @classmethod
    def unconstrained(cls, **changes: Any) -> SepMEConfig:
        """Give the paper's constants for `SepMETrainer.erase_permanently`: those of `paper`, Adam at 1e-5, tau 0."""
        return cls.paper(**({"learning_rate": 1e-5, "tolerance": 0.0} | changes))

    @property
    def is_calibrated(self) -> bool:
        """Whether anything is set by what prompts read."""
        return CALIBRATED in (self.gate, self.soft_guard_weight)

    @classmethod
    def linear(cls, **changes: Any) -> SepMEConfig:
        """Give settings for an increment without a gate: it acts on every prompt in proportion to what it reads."""
        return cls(**({"rank": 16, "soft_guard_weight": 300.0, "gain": None, "gate": None} | changes))

    def for_adapter(self) -> SepMEConfig:
        """Give the settings for the adapter that stands for a gated increment: those of `linear`."""
        linear = type(self).linear()
        weight = self.adapter_soft_guard_weight
        return replace(
            self,
            rank=max(self.rank, linear.rank),
            gate=None,
            gain=None,
            soft_guard_weight=linear.soft_guard_weight if weight is None else weight,
        )

    def to_dict(self) -> dict[str, Any]:
        """Give a dict of plain values that `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SepMEConfig:
        """Read the config that `to_dict` wrote.

        Raises:
            ValueError: If a field is unknown, naming it and the known ones, or out of range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"SepMEConfig has no fields {unknown}; it has {sorted(known)}")
        return cls(**values)
