"""SepMEConfig: everything that decides how an erasure is made. It validates itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Solver = Literal["train", "closed_form", "closed_form+train"]
Basis = Literal["full", "aligned"]
Parametrisation = Literal["module", "text"]
Coupling = Literal["separate", "joint"]


@dataclass(frozen=True)
class SepMEConfig:
    """How to make an increment; the defaults are tuned to work on every base model.

    Args:
        solver: "train" minimises the paper's correlation loss; "closed_form" solves for the increment directly;
            "closed_form+train" trains on from there.
        basis: For training. "full" is the paper's: the whole null space of the guard. "aligned" holds the `rank`
            directions that the closed form found, which carry the soft guards too.
        parametrisation: For training. "module" learns one C a module, "text" one B for all of them: a text-side
            increment, as the closed form gives, which serves every base with the same text encoder.
        coupling: For training. "separate" makes each increment alone; "joint" (the paper's †) makes those of one call
            together, their losses balanced.
        rank: Width of an aligned basis, and the rank of a closed-form increment.
        learning_rate: Of Adam, on the coefficients.
        beta: Scale of the basis: an increment is w (beta S). With `relative`, the same value for every width of the
            basis and of the text embedding: the scale used is beta * (768 / width) ** 0.5.
        momentum: alpha of the momentum statistic L <- alpha L + (1 - alpha) L_cor.
        sparsity: Weight of the increments' mean absolute value (the paper's lambda).
        tolerance: tau. Training stops as soon as the momentum statistic falls to it.
        relative: Read `tolerance` as a share of the unedited correlation, and normalise `beta`.
        min_steps: Training never stops before this many steps.
        max_steps: Training always stops after this many steps.
        batch_size: Noisy pictures a step.
        steps_per_batch: Steps on each of these batches, for all of which the original model predicts once.
        n_images: Pictures x_0 that the original model makes of the concept beforehand.
        image_steps: Denoising steps for those pictures.
        guidance_scale: Guidance for those pictures.
        soft_guard_weight: What moving regular prompts costs, relative to moving the concept's own.
        gain: The share of the wanted change that a closed-form increment gives the concept's own prompts: it is scaled
            to that. Default: as the regression leaves it, less the more there is to guard.
        gate: An increment acts on a prompt only if it reads at least this share of what it reads in each of the
            concept's own prompts: on all others nothing moves, not by a bit. Default: no gate; it acts on every
            prompt in proportion to what it reads, as a LoRA does, which is what exports hold in either case.
        ridge: What the norm of a closed-form increment costs, relative to the embedding's mean square.
        guard_tolerance: A direction belongs to the guard if its singular value exceeds this share of the largest.
        reserve: The share of the embedding's dimensions that guards must leave free. Where the names of the other
            concepts would take more, they are damped, not exact; your own guards are always exact.
        name_weight: What moving a damped name costs, relative to moving the concept's own prompts.
        seed: Of the pictures, the noise and the timesteps.

    Raises:
        ValueError: Listing every field that is out of range.

    Source: arXiv 2402.05947 ("implementation details") for the paper's constants.
    """

    solver: Solver = "train"
    basis: Basis = "aligned"
    parametrisation: Parametrisation = "module"
    coupling: Coupling = "separate"
    rank: int = 16
    learning_rate: float = 0.1
    beta: float = 3e-3
    momentum: float = 0.9
    sparsity: float = 1e-6
    tolerance: float = 0.02
    relative: bool = True
    min_steps: int = 10
    max_steps: int = 300
    batch_size: int = 8
    steps_per_batch: int = 4
    n_images: int = 24
    image_steps: int = 20
    guidance_scale: float = 4.0
    soft_guard_weight: float = 300.0
    gain: float | None = None
    gate: float | None = None
    ridge: float = 1e-5
    guard_tolerance: float = 1e-6
    reserve: float = 0.25
    name_weight: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        faults = [
            *(f"{name} must be one of {options}, not {value!r}" for name, value, options in self._choices()),
            *(
                f"{name} must be positive, not {getattr(self, name)!r}"
                for name in _POSITIVE
                if not getattr(self, name) > 0
            ),
            *(
                f"{name} must not be negative, not {getattr(self, name)!r}"
                for name in _AT_LEAST_0
                if not getattr(self, name) >= 0
            ),
        ]
        if not 0 <= self.momentum < 1:
            faults.append(f"momentum must be in [0, 1), not {self.momentum!r}")
        if not 0 < self.guard_tolerance < 1:
            faults.append(f"guard_tolerance must be between 0 and 1, not {self.guard_tolerance!r}")
        if not 0 < self.reserve < 1:
            faults.append(f"reserve must be between 0 and 1, not {self.reserve!r}")
        if self.gain is not None and not self.gain > 0:
            faults.append(f"gain must be positive or None, not {self.gain!r}")
        if self.gate is not None and not 0 < self.gate < 1:
            faults.append(f"gate must be between 0 and 1 or None, not {self.gate!r}")
        if self.min_steps > self.max_steps:
            faults.append(f"min_steps ({self.min_steps}) must not exceed max_steps ({self.max_steps})")
        if faults:
            raise ValueError("SepMEConfig: " + "; ".join(faults))

    def _choices(self) -> list[tuple[str, Any, tuple[str, ...]]]:
        options = {"solver": Solver, "basis": Basis, "parametrisation": Parametrisation, "coupling": Coupling}
        choices = [(name, getattr(self, name), get_args(kind)) for name, kind in options.items()]
        return [choice for choice in choices if choice[1] not in choice[2]]

    @classmethod
    def paper(cls, **changes: Any) -> SepMEConfig:
        """The paper's constants: full basis, Adam at 0.1, beta 1e-4, lambda 1e-6, tau 1e-4, 10 to 1000 steps, each on
        noise of its own."""
        constants: dict[str, Any] = {
            "basis": "full", "learning_rate": 0.1, "beta": 1e-4, "momentum": 0.9, "sparsity": 1e-6,
            "tolerance": 1e-4, "relative": False, "min_steps": 10, "max_steps": 1000, "steps_per_batch": 1,
        }  # fmt: skip
        return cls(**(constants | changes))

    @classmethod
    def unconstrained(cls, **changes: Any) -> SepMEConfig:
        """The paper's constants for `SepMETrainer.erase_permanently`: as `paper`, with Adam at 1e-5."""
        return cls.paper(**({"learning_rate": 1e-5} | changes))

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values that `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SepMEConfig:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: On a field that this version does not know, naming it and the known ones.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"SepMEConfig has no fields {unknown}; it has {sorted(known)}")
        return cls(**values)


_POSITIVE = (
    "rank", "learning_rate", "beta", "tolerance", "min_steps", "max_steps", "batch_size", "steps_per_batch",
    "n_images", "image_steps", "ridge",
)  # fmt: skip
_AT_LEAST_0 = ("sparsity", "guidance_scale", "soft_guard_weight", "name_weight", "seed")
