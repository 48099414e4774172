"""Plan: what is known of an increment before it is solved for. It holds checks, null space, closed form and basis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from sepme_diffusers.algebra.closed_form import Sums, given_share, reduced_rank_edit, with_gain
from sepme_diffusers.algebra.subspace import damped
from sepme_diffusers.bank.guard_sets import Guarded, GuardSet
from sepme_diffusers.increment.config import CALIBRATED, SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.calibration import WEIGHTS, RegularRows, best_weight, calibrated, made_for
from sepme_diffusers.making.embedded import EmbeddedConcept
from sepme_diffusers.making.guards import Guards
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import TOKENS
from sepme_diffusers.text.spelling import spells

# The width of the text embedding for which `SepMEConfig.beta` is given: that of Stable Diffusion 1.x.
_WIDTH_OF_BETA = 768
# Below this share of its embedding, the change that is wanted of a concept at a further door is rounding.
_LEAST_CHANGE = 1e-4
# What an adapter gives of the wanted change: with less, objects of the built-in model come back.
_LEAST_GIVEN = 0.45


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
        guards: What may not change.
        soft: Returns P for a concept: what moving regular prompts costs, (d, d); or None.
        output_factor: Returns Fₒ (d, p), see `reduced_rank_edit`; or None for the identity.
        regular: Returns the regular prompts by which a concept's weights and gates are calibrated.
        doors: The same at further doors of the denoiser, by door name.
    """

    guards: Guards
    soft: Callable[[Concept], Tensor | None] = lambda _: None
    output_factor: Callable[[], Tensor | None] = lambda: None
    regular: Callable[[Concept], RegularRows | None] = lambda _: None
    doors: Mapping[str, Problem] = field(default_factory=dict)

    @property
    def config(self) -> SepMEConfig:
        """The settings."""
        return self.guards.config

    @property
    def n_exact(self) -> int:
        """How many names, the first ones, are guarded exactly at every door."""
        return min([self.guards.n_exact, *(problem.n_exact for problem in self.doors.values())])

    def guard_set(self, known: Iterable[GuardSet] = ()) -> GuardSet:
        """Return what every increment of this problem guards, see `Guards.guard_set`."""
        return self.guards.guard_set(self.n_exact, known)

    def update(self, names: Sequence[str], embeddings: Mapping[str, Tensor]) -> None:
        """Take in more names that are guarded.

        Args:
            names: The names.
            embeddings: {door: (n_names, n_tokens, d)} of the names as prompts.
        """
        self.guards.update(names, embeddings[TOKENS])
        for door, problem in self.doors.items():
            problem.guards.update(names, embeddings[door])

    def room(self, concept: EmbeddedConcept) -> Room:
        """Return what the guards leave of a concept: of the prompts that its increment is made for.

        Of many prompts some are held out where a gate is calibrated.

        Raises:
            ValueError: If the guards leave nothing.
        """
        learnt = concept.only(made_for(len(concept.own))) if self.config.is_calibrated else concept
        self.guards.refuse_alike(concept)
        null = self.guards.null(concept.concept)
        inside = learnt.rows.double() @ null.T
        return Room(learnt, null, inside, self.guards.refuse_unreachable(learnt, inside))

    def factors(self, room: Room, config: SepMEConfig) -> tuple[Tensor, Tensor]:
        """Solve for A (r, d) and B (d, r), float64, with A in the null space (k, d).

        Args:
            room: The concept's.
            config: `rank`, `ridge`, `gain`, and a `soft_guard_weight` that is a number.

        Raises:
            ValueError: If no change is wanted.
        """
        if config.soft_guard_weight == CALIBRATED:
            raise ValueError("the weight of regular prompts has to be chosen first, see `weighted`")
        concept, output_factor = room.learnt, self.output_factor()
        own, change = concept.rows, concept.wanted_change
        soft = self.soft(concept.concept)
        penalty = self.guards.penalty(concept, room.null, soft, config.soft_guard_weight)
        # Several weights are tried, so the rows are added up once.
        sums = room.sums if self.config.soft_guard_weight == CALIBRATED else None
        factors = reduced_rank_edit(
            own, change, room.null, config.rank, penalty, config.ridge, output_factor, room.inside, sums
        )
        return factors if config.gain is None else with_gain(factors, own, change, config.gain, output_factor)

    def weighted(self, room: Room, concept: EmbeddedConcept, config: SepMEConfig) -> SepMEConfig:
        """Choose the weight of regular prompts, where it is to be calibrated: the one that separates best.

        Raises:
            ValueError: If no change is wanted, or there are no regular prompts to calibrate by.
        """
        if config.soft_guard_weight != CALIBRATED:
            return config

        def solved(weight: float) -> Increment:
            return as_increment(self.factors(room, replace(config, soft_guard_weight=weight)))

        weight = best_weight(solved, concept.own, self._regular(concept.concept))
        return replace(config, soft_guard_weight=weight)

    def for_adapter(self, concept: EmbeddedConcept, config: SepMEConfig) -> tuple[Tensor, Tensor]:
        """Solve once more for where there is no gate: regular prompts weigh as much as leaves an effect.

        Raises:
            ValueError: If no change is wanted.
        """
        guards = self.guards.without_gate()
        return replace(self, guards=guards)._of_least_cost(concept, config.for_adapter())

    def _of_least_cost(self, concept: EmbeddedConcept, config: SepMEConfig) -> tuple[Tensor, Tensor]:
        """Solve with the largest weight of regular prompts that leaves an effect, unless a weight is given."""
        room = self.room(concept)
        own, change = room.learnt.rows, room.learnt.wanted_change
        if config.adapter_soft_guard_weight is not None or self.soft(concept.concept) is None:
            return self.factors(room, config)
        for weight in reversed(WEIGHTS):
            factors = self.factors(room, replace(config, soft_guard_weight=weight))
            if given_share(factors, own, change, self.output_factor()) >= _LEAST_GIVEN:
                break
        return factors

    def _regular(self, concept: Concept) -> RegularRows:
        regular = self.regular(concept)
        if regular is None:
            raise ValueError("to calibrate takes regular prompts; give some, or the weight and the gate as numbers")
        return regular

    def gated(self, increment: Increment, concept: EmbeddedConcept) -> tuple[Increment, dict[str, float]]:
        """Set the gate that the config asks for, at the tokens; return the metrics of a calibrated one as well.

        Raises:
            ValueError: If it reads nothing in one of the concept's prompts, or there are no regular prompts to
                calibrate by.
        """
        gate = self.config.gate
        if gate is None or isinstance(gate, float):
            return (increment if gate is None else increment.gated(concept.own, gate)), {}
        said = concept.concept
        spelled = torch.tensor([spells(prompt, said.spellings) for prompt in said.prompts])
        return calibrated(increment, concept.own, self._regular(said), said.name, spelled, said.prompts)

    def at_doors(self, concept: EmbeddedConcept) -> dict[str, Increment]:
        """Solve at the further doors, in closed form; those that hardly tell concept from anchors are left out.

        Raises:
            ValueError: If the guards leave no room at one of them.
        """
        parts = ((problem, door, concept.doors[door]) for door, problem in self.doors.items())
        return {door: problem._at_door(part) for problem, door, part in parts if _tells_apart(part)}

    def _at_door(self, concept: EmbeddedConcept) -> Increment:
        room = self.room(concept)
        factors = self.factors(room, self.weighted(room, concept, self.config))
        return self.gated(as_increment(factors), concept)[0]

    def full_basis(self, room: Room) -> Tensor:
        """The whole null space (k, d), with directions shortened by what of damped names they hold."""
        penalty = self.guards.penalty(room.learnt, room.null)
        return room.null if penalty is None else damped(room.null, penalty, room.learnt.rows)


@dataclass(frozen=True, eq=False)
class Room:
    """What the guards leave of a concept.

    Args:
        learnt: The concept, with the prompts that its increment is made for.
        null: N, orthonormal rows (k, d) of what an increment may use.
        inside: X = E Nᵀ of the concept's rows, (n, k), float64.
        reach: ‖X‖ / ‖E‖, the share of the concept's embedding that an increment can touch.
    """

    learnt: EmbeddedConcept
    null: Tensor
    inside: Tensor
    reach: float

    @cached_property
    def sums(self) -> Sums:
        """What several solves share."""
        return Sums.of(self.inside, self.learnt.wanted_change)


def _tells_apart(concept: EmbeddedConcept) -> bool:
    return float(concept.wanted_change.norm()) > _LEAST_CHANGE * float(concept.rows.norm())


@dataclass(frozen=True)
class Plan:
    """What is known of an increment before it is solved for.

    Args:
        embedded: The concept.
        problem: What it was prepared for.
        reach: ‖E P‖ / ‖E‖, the share of the concept's embedding that the increment can touch.
        dimensions_left: How many dimensions of the embedding it may use.
        factors: A (r, d) and B (d, r) of the closed form, float64; None where nothing needs them.
        full_basis: The directions (k, d) of a full basis; None for an aligned one.
        doors: What the increment does at further doors of the denoiser, which every solver takes as it is.
        config: The problem's, with the weight of regular prompts that was chosen.
        adapter: The closed form that stands for a gated increment where there is no gate; None where none was asked
            for.
    """

    embedded: EmbeddedConcept
    problem: Problem
    reach: float
    dimensions_left: int
    factors: tuple[Tensor, Tensor] | None
    full_basis: Tensor | None
    doors: Mapping[str, Increment]
    config: SepMEConfig
    adapter: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, embedded: EmbeddedConcept, problem: Problem, solver: Needs, adapters: bool = False) -> Plan:
        """Check that a concept can be erased, and prepare what the solver needs.

        Args:
            embedded: The concept.
            problem: The regression, fitted to all names.
            solver: What it is prepared for.
            adapters: Whether what is gated is solved once more for its adapter.

        Raises:
            ValueError: If the guards leave no room, or the concept's prompts and anchors are read the same.
        """
        full = solver.trains and problem.config.basis == "full"
        room = problem.room(embedded)
        config = problem.weighted(room, embedded, problem.config)
        gated = adapters and config.gate is not None and not solver.trains
        return cls(
            embedded,
            problem,
            room.reach,
            len(room.null),
            problem.factors(room, config) if solver.starts_from_closed_form or not full else None,
            problem.full_basis(room) if full else None,
            problem.at_doors(embedded),
            config,
            problem.for_adapter(embedded, config) if gated else None,
        )

    @property
    def concept(self) -> Concept:
        """What is erased."""
        return self.embedded.concept

    @property
    def guards(self) -> Guarded:
        """The prompts that the increment leaves alone."""
        return Guarded(self.problem.guard_set(), self.concept.name)

    def closed_form(self) -> Increment:
        """The closed form at the token door as an increment, float32 on the CPU."""
        return as_increment(self._solved())

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


def as_increment(factors: tuple[Tensor, Tensor]) -> Increment:
    """Make a text-side increment, float32 on the CPU, of A (r, d) and B (d, r)."""
    a, b = factors
    return Increment(a.float().cpu(), B=b.float().cpu())
