"""Plan: what is known of an increment before it is solved for. It holds checks, null space, closed form and basis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from sepme_diffusers.algebra.closed_form import reduced_rank_edit, with_gain
from sepme_diffusers.algebra.subspace import damped
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.guards import Guards
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import rows

# The width of the text embedding for which `SepMEConfig.beta` is given: that of Stable Diffusion 1.x.
_WIDTH_OF_BETA = 768


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
    """The regression that the closed form solves, for any concept.

    Args:
        guards: What may not change, with the embeddings of prompts.
        soft: Returns P for a concept: what moving regular prompts costs, weighted, (d, d); or None.
        output_factor: Returns Fₒ (d, p), see `reduced_rank_edit`; or None for the identity.
    """

    guards: Guards
    soft: Callable[[Concept], Tensor | None]
    output_factor: Callable[[], Tensor | None]

    def factors(self, concept: Concept, null: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for A (r, d) and B (d, r), float64, with A in the null space (k, d).

        Raises:
            ValueError: If no change is wanted.
        """
        config, encoded = self.guards.config, self.guards.encoded
        embeddings = encoded(concept.prompts)
        own, change = rows(embeddings), rows(encoded.anchors(concept) - embeddings)
        output_factor = self.output_factor()
        factors = reduced_rank_edit(
            own,
            change,
            null,
            config.rank,
            self.soft(concept),
            config.ridge,
            output_factor,
            self.guards.penalty_inside(concept),
        )
        return factors if config.gain is None else with_gain(factors, own, change, config.gain, output_factor)

    def full_basis(self, concept: Concept, null: Tensor) -> Tensor:
        """The whole null space (k, d), with directions shortened by what of damped names they hold."""
        penalty = self.guards.penalty(concept)
        return null if penalty is None else damped(null, penalty, rows(self.guards.encoded(concept.prompts)))


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
    """

    concept: Concept
    guards: tuple[str, ...]
    reach: float
    dimensions_left: int
    factors: tuple[Tensor, Tensor] | None
    full_basis: Tensor | None

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
        )

    def closed_form(self) -> Increment:
        """The closed form as an increment, float32 on the CPU."""
        a, b = self._solved()
        return Increment(a.float().cpu(), B=b.float().cpu())

    def basis(self, config: SepMEConfig, weights: Mapping[str, Tensor]) -> Tensor:
        """β S (r, d): the full basis, or the orthonormal directions that the closed form reads, scaled.

        Args:
            config: `beta`, `relative`, `parametrisation`.
            weights: W_m (d_out, d) by module name.
        """
        directions = self.full_basis
        if directions is None:
            directions = torch.linalg.svd(self._solved()[0], full_matrices=False).Vh
        beta = config.beta
        if config.relative:
            # An Adam step moves every coefficient by about the learning rate, so a wider basis takes a longer step.
            beta *= (_WIDTH_OF_BETA / len(directions)) ** 0.5
            if config.parametrisation == "text":
                # A change of the embedding reaches a projection multiplied by the length of the projection's rows.
                squares = [weight.float().square().sum(dim=1) for weight in weights.values()]
                beta /= float(torch.cat(squares).mean().sqrt())
        return beta * directions

    def _solved(self) -> tuple[Tensor, Tensor]:
        """The factors, for what needs them; `of` has made them then."""
        return cast(tuple[Tensor, Tensor], self.factors)
