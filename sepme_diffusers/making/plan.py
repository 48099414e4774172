"""Plan: what is known of an increment before it is solved for. It holds checks, null space, closed form and basis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sepme_diffusers.algebra.closed_form import reduced_rank_edit, with_gain
from sepme_diffusers.algebra.subspace import damped
from sepme_diffusers.bank.guard_sets import GuardSet
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.guards import Guards
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import rows

# The width of the text embedding for which `SepMEConfig.beta` is given: that of Stable Diffusion 1.x.
_WIDTH_OF_BETA = 768
# Below this share of its embedding, the change that is wanted of a concept at a further door is rounding.
_LEAST_CHANGE = 1e-4


class Needs(Protocol):
    """What a solver needs of its plans.

    Attributes:
        trains: Whether it takes training steps on noisy pictures.
        starts_from_closed_form: Whether its plans need the closed form whatever the basis.
    """

    trains: bool
    starts_from_closed_form: bool


@dataclass(frozen=True)
class Problem:
    """The regression that the closed form solves at one door, for any concept.

    Args:
        guards: What may not change, with the embeddings of prompts at this door.
        soft: Returns P for a concept: what moving regular prompts costs, weighted, (d, d); or None.
        output_factor: Returns Fₒ (d, p), see `reduced_rank_edit`; or None for the identity.
        doors: The same at further doors of the denoiser, by door name.
    """

    guards: Guards
    soft: Callable[[Concept], Tensor | None]
    output_factor: Callable[[], Tensor | None]
    doors: Mapping[str, Problem] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether names are guarded exactly at every door."""
        return self.guards.exact and all(problem.exact for problem in self.doors.values())

    @property
    def damped(self) -> tuple[str, ...]:
        """The names that are not guarded exactly at one of the doors."""
        return () if self.exact else self.guards.names

    def guard_set(self, known: Iterable[GuardSet] = ()) -> GuardSet:
        """Return what every increment of this problem guards, see `Guards.guard_set`."""
        return self.guards.guard_set(self.exact, known)

    def factors(self, concept: Concept, null: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for A (r, d) and B (d, r), float64, with A in the null space (k, d).

        Raises:
            ValueError: If no change is wanted.
        """
        config, output_factor = self.guards.config, self.output_factor()
        own, change = self._rows(concept), self._wanted_change(concept)
        penalty = self.guards.penalty(concept, null, self.soft(concept))
        factors = reduced_rank_edit(own, change, null, config.rank, penalty, config.ridge, output_factor)
        return factors if config.gain is None else with_gain(factors, own, change, config.gain, output_factor)

    def gated(self, increment: Increment, concept: Concept) -> Increment:
        """Set the gate that the config asks for, at a share of what the increment reads in the concept's prompts.

        Raises:
            ValueError: If it reads nothing in one of them.
        """
        share = self.guards.config.gate
        return increment if share is None else increment.gated(self.guards.encoded(concept.prompts), share)

    def at_doors(self, concept: Concept) -> dict[str, Increment]:
        """Solve at the further doors, in closed form; those that hardly tell concept from anchors are left out.

        Raises:
            ValueError: If the guards leave no room at one of them.
        """
        return {
            door: problem._at_door(concept) for door, problem in self.doors.items() if problem._tells_apart(concept)
        }

    def _at_door(self, concept: Concept) -> Increment:
        self.guards.refuse_unreachable(concept)
        return self.gated(_as_increment(self.factors(concept, self.guards.null(concept))), concept)

    def _tells_apart(self, concept: Concept) -> bool:
        return float(self._wanted_change(concept).norm()) > _LEAST_CHANGE * float(self._rows(concept).norm())

    def _rows(self, concept: Concept) -> Tensor:
        return rows(self.guards.encoded(concept.prompts))

    def _wanted_change(self, concept: Concept) -> Tensor:
        return rows(self.guards.encoded.anchors(concept)) - self._rows(concept)

    def full_basis(self, concept: Concept, null: Tensor) -> Tensor:
        """The whole null space (k, d), with directions shortened by what of damped names they hold."""
        penalty = self.guards.penalty(concept, null)
        return null if penalty is None else damped(null, penalty, self._rows(concept))


@dataclass(frozen=True)
class Plan:
    """What is known of an increment before it is solved for.

    Args:
        concept: What is erased.
        guards: The prompts that the increment leaves alone.
        reach: ‖E P‖ / ‖E‖, the share of the concept's embedding that the increment can touch.
        dimensions_left: How many dimensions of the embedding it may use.
        factors: A (r, d) and B (d, r) of the closed form, float64; None where nothing needs them.
        full_basis: The directions (k, d) of a full basis; None for an aligned one.
        doors: What the increment does at further doors of the denoiser, which every solver takes as it is.
    """

    concept: Concept
    guards: tuple[str, ...]
    reach: float
    dimensions_left: int
    factors: tuple[Tensor, Tensor] | None
    full_basis: Tensor | None
    doors: Mapping[str, Increment]

    @classmethod
    def of(cls, concept: Concept, problem: Problem, solver: Needs) -> Plan:
        """Check that the concept can be erased, and prepare what the solver needs.

        Raises:
            ValueError: If the guards leave no room, or the concept's prompts and anchors are read the same.
        """
        guards, full = problem.guards, solver.trains and problem.guards.config.basis == "full"
        reach, null = guards.refuse_unreachable(concept), guards.null(concept)
        return cls(
            concept,
            guards.prompts(concept),
            reach,
            len(null),
            problem.factors(concept, null) if solver.starts_from_closed_form or not full else None,
            problem.full_basis(concept, null) if full else None,
            problem.at_doors(concept),
        )

    def closed_form(self) -> Increment:
        """The closed form at the token door as an increment, float32 on the CPU."""
        return _as_increment(self._solved())

    def basis(self, config: SepMEConfig, weights: Mapping[str, Tensor]) -> Tensor:
        """β S (r, d): the full basis, or the orthonormal directions that the closed form reads, scaled.

        Args:
            config: `beta`, `relative`, `parametrisation`.
            weights: W_m (d_out, d) by module name.
        """
        directions = self._closed_directions() if self.full_basis is None else self.full_basis
        beta = config.beta
        if config.relative:
            # An Adam step moves every coefficient by about the learning rate, so a wider basis takes a longer step.
            beta *= (_WIDTH_OF_BETA / len(directions)) ** 0.5
            if config.parametrisation == "text":
                # A change of the embedding reaches a projection multiplied by the length of the projection's rows.
                squares = [weight.float().square().sum(dim=1) for weight in weights.values()]
                beta /= float(torch.cat(squares).mean().sqrt())
        return beta * directions

    def _closed_directions(self) -> Tensor:
        a, _ = self._solved()
        return torch.linalg.svd(a, full_matrices=False).Vh

    def _solved(self) -> tuple[Tensor, Tensor]:
        if self.factors is None:
            raise ValueError(f"the plan for {self.concept.name!r} was made without the closed form")
        return self.factors


def _as_increment(factors: tuple[Tensor, Tensor]) -> Increment:
    a, b = factors
    return Increment(a.float().cpu(), B=b.float().cpu())
