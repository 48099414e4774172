"""Guards: what an increment may not change, what it should change little, and how much room that leaves."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import logging
from torch import Tensor

from sepme_diffusers.algebra.subspace import null_space, row_space
from sepme_diffusers.bank.guard_sets import GuardSet
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.embedded import EmbeddedConcept
from sepme_diffusers.making.likeness import Likenesses
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import Encoded, rows

logger = logging.get_logger(__name__)

# Below this share of its embedding, what the guards leave of a concept is rounding.
_LEAST_REACH = 1e-4
NAMES_AT_A_TIME = 256
"""How many names are best given to `Guards.update` at a time: a few hundred MB while they are taken in."""


@dataclass(frozen=True)
class Capacity:
    """How much room there is for an increment, known before it is made.

    Dimensions and reach are of the tokens. A further door has room for as many prompts as it is wide.

    Args:
        concept: What would be erased.
        dimensions: d, the width of the text embedding.
        dimensions_left: How many of these an increment of the concept may use.
        dimensions_taken: How many its name takes from every other increment that guards it exactly.
        names: How many names there are, of all concepts.
        names_exact: How many of them are guarded exactly, at every door. The others are damped.
        reach: ‖E P‖ / ‖E‖, the share of the concept's embedding that an increment can touch.
        leakage: The largest share by which its closed-form increment moves another name, see `increment.leakage`.
    """

    concept: str
    dimensions: int
    dimensions_left: int
    dimensions_taken: int
    names: int
    names_exact: int
    reach: float
    leakage: float


class Guards:
    """The guards of the increments of one bank at one door, fitted to prompts and names that come in batches.

    As long as the names of all concepts leave room, every increment guards every other concept's name exactly; its own
    name is no guard. Beyond that, the names that came first are exact, as many as leave room, and the others are
    damped: an increment pays for moving them. An increment without a gate damps all of them then: it needs the
    directions that exact names would take, and with them it would hardly erase. The prompts listed as guards are
    always exact.

    Names that fit are kept as token rows. Of damped ones only the sum of their outer products is kept, so that there
    may be very many.

    Args:
        hard: Prompts that no increment may change.
        embeddings: Of these prompts, (n_prompts, n_tokens, d).
        config: `guard_tolerance`, `reserve`, `name_weight`, `gate`.

    Attributes:
        names: The names so far.
        n_exact: How many of them, the first ones, are guarded exactly.
    """

    def __init__(self, hard: Sequence[str], embeddings: Tensor, config: SepMEConfig) -> None:
        self.hard, self.config = tuple(hard), config
        self.width = embeddings.shape[-1]
        self._hard_rows = rows(embeddings)
        self._names: dict[str, None] = {}
        self._kept: dict[str, Tensor] = {}
        self._energy: Tensor | None = None
        self._likenesses = Likenesses(self.hard, embeddings)
        # Made once for all concepts: guard sets, by how many names are exact; and by weight soft guards, and the
        # penalty of all names with them.
        self._sets: dict[int, GuardSet] = {}
        self._penalties: dict[float, tuple[Tensor | None, Tensor | None]] = {}
        self._null_of: tuple[int, Tensor] | None = None
        self._loose: tuple[int, Guards] | None = None

    @classmethod
    def of(cls, encoded: Encoded, hard: Sequence[str], names: Iterable[str], config: SepMEConfig) -> Guards:
        """Fit guards to prompts and names at one door of a pipeline."""
        guards, names = cls(hard, encoded(hard), config), list(names)
        for start in range(0, len(names), NAMES_AT_A_TIME):
            batch = names[start : start + NAMES_AT_A_TIME]
            guards.update(batch, encoded(batch))
        return guards

    def update(self, names: Sequence[str], embeddings: Tensor) -> None:
        """Take in more names; those that should rather be exact come first.

        Args:
            names: The names; those of hard guards are passed over.
            embeddings: Of the names as prompts, (n_names, n_tokens, d).
        """
        new = [index for index, name in enumerate(names) if name not in self.hard and name not in self._names]
        if not new:
            return
        names, embeddings = [names[index] for index in new], embeddings[new]
        self._names |= dict.fromkeys(names)
        self._likenesses.update(names, embeddings)
        self._penalties, self._sets = {}, {}
        if self._energy is None:
            self._kept |= dict(zip(names, embeddings, strict=True))
            if not self._all_fit():
                self._damp_the_last()
        else:
            self._energy = _energy(embeddings, self._energy)

    @property
    def _room(self) -> int:
        """How many dimensions guards may take."""
        return int((1 - self.config.reserve) * self.width)

    def _taken(self, names: Iterable[str]) -> int:
        """How many dimensions the hard guards take together with kept names."""
        tokens = torch.cat([self._hard_rows, *(self._kept[name] for name in names)])
        return len(row_space(tokens, self.config.guard_tolerance))

    def _all_fit(self) -> bool:
        """Tell whether every name can be exact: each increment guards all of them but its own concept's."""
        names = list(self._kept)
        taken, n_tokens = self._taken(names), len(self._kept[names[-1]])
        # Without the one that is left out it is less by its tokens at most.
        if taken <= self._room or taken - n_tokens > self._room:
            return taken <= self._room
        return all(self._taken(other for other in names if other != name) <= self._room for name in names)

    def _damp_the_last(self) -> None:
        """Keep as many of the first names exact as leave room, whosever increment it is, and damp the others."""
        names, fitting = list(self._kept), 0
        if self.config.gate is not None:
            fitting = bisect_right(range(1, len(names) + 1), self._room, key=lambda count: self._taken(names[:count]))
        damped = names[fitting:]
        logger.warning(
            f"the guards and the names of {len(self._names)} concepts do not fit in the {self._room} of {self.width} "
            f"dimensions that reserve={self.config.reserve:g} gives them: the first {fitting} names are guarded "
            "exactly, and the others are damped; what they leak is measured and stored in the bank"
        )
        self._energy = _energy(torch.stack([self._kept.pop(name) for name in damped]))
        # They are parts of whole batches, which nothing else needs.
        self._kept = {name: kept.clone() for name, kept in self._kept.items()}

    def without_gate(self) -> Guards:
        """Return the same guards for increments without a gate: where not all names are exact, none is."""
        if self._energy is None or not self._kept:
            return self
        if self._loose is None or self._loose[0] != len(self._names):
            loose = copy.copy(self)
            loose._kept, loose._energy = {}, _energy(torch.stack(list(self._kept.values())), self._energy)
            loose._sets, loose._penalties, loose._null_of = {}, {}, None
            self._loose = len(self._names), loose
        return self._loose[1]

    @property
    def names(self) -> tuple[str, ...]:
        """The names so far."""
        return tuple(self._names)

    def prompts(self, concept: Concept) -> tuple[str, ...]:
        """Return what an increment of the concept guards: the hard prompts, and every name but its own."""
        return (*self.hard, *(name for name in self._names if name != concept.name))

    @property
    def n_exact(self) -> int:
        """How many names, the first ones, are guarded exactly."""
        return len(self._kept)

    def guard_set(self, n_exact: int, known: Iterable[GuardSet] = ()) -> GuardSet:
        """Return what every increment of the bank guards, as an extension of a known set where that is possible.

        Args:
            n_exact: How many names, the first ones, are guarded exactly at every door.
            known: The bank's sets.
        """
        sets = tuple(known)
        if sets or n_exact not in self._sets:
            names = self.names
            made = GuardSet.of((*self.hard, *names[:n_exact]), names[n_exact:], sets)
            if sets:
                return made
            self._sets[n_exact] = made
        return self._sets[n_exact]

    def null(self, concept: Concept) -> Tensor:
        """Return N, orthonormal rows (k, d) of what an increment of the concept may use."""
        if concept.name not in self._kept:
            return self._null
        return null_space(self._rows_without(concept.name), self.config.guard_tolerance)

    def penalty(
        self, concept: EmbeddedConcept, null: Tensor, soft: Tensor | None = None, weight: float = 1.0
    ) -> Tensor | None:
        """Return N P Nᵀ (k, k), float64: what moving damped names and regular prompts costs; None for nothing.

        Args:
            concept: The concept; its own name costs nothing.
            null: N, its `null`, (k, d); the penalty is on the same device.
            soft: What moving regular prompts costs, (d, d).
            weight: Of `soft`.
        """
        name = concept.concept.name
        penalty = self._projected(null, soft, weight) if name in self._kept else self._shared(null, soft, weight)
        if penalty is None or name in self._kept or name not in self._names:
            return penalty
        own = concept.name.to(null) @ null.T
        return torch.addmm(penalty, own.T, own, alpha=-self.config.name_weight / len(own))

    def _shared(self, null: Tensor, soft: Tensor | None, weight: float) -> Tensor | None:
        """The penalty with all names in it, computed once for the concepts that share null space and soft guards."""
        if weight not in self._penalties or self._penalties[weight][0] is not soft:
            self._penalties[weight] = soft, self._projected(null, soft, weight)
        return self._penalties[weight][1]

    def _projected(self, null: Tensor, soft: Tensor | None, weight: float) -> Tensor | None:
        costs = [] if self._energy is None else [self.config.name_weight * self._energy.to(null)]
        costs += [] if soft is None else [weight * soft.to(null)]
        return null @ torch.stack(costs).sum(dim=0) @ null.T if costs else None

    def refuse_alike(self, concept: EmbeddedConcept) -> None:
        """Check that no guard is to the text encoder the same as one of the concept's prompts.

        Raises:
            ValueError: If one is, naming both.
        """
        name = concept.concept.name
        # Its own name is no guard, unless it is one that was asked for.
        if same := self._likenesses.alike(concept.own, besides=None if name in self.hard else name):
            index, guard = same
            raise ValueError(
                f"the prompt {concept.concept.prompts[index]!r} of concept {name!r} is to the text encoder the guard "
                f"{guard!r}: no dimension is left to tell them apart; drop one of them"
            )

    def refuse_unreachable(self, concept: EmbeddedConcept, inside: Tensor) -> float:
        """Check that an increment can touch some of the concept's embedding, and return the share ‖E P‖ / ‖E‖.

        Args:
            concept: The concept.
            inside: X = E Nᵀ of its rows, (n, k).

        Raises:
            ValueError: If it cannot.
        """
        reach, name = float(inside.norm() / concept.rows.double().norm()), concept.concept.name
        if reach < _LEAST_REACH:
            raise ValueError(
                f"the {len(self.prompts(concept.concept))} guard prompts fill the space that {name!r} lives in (reach "
                f"{reach:.1e}): nothing can be erased; guard fewer prompts, or move some of them to the soft guards"
            )
        return reach

    def dimensions_taken(self, concept: EmbeddedConcept) -> int:
        """Return how many dimensions the concept's name takes from each increment that guards it exactly."""
        others = self._rows_without(concept.concept.name)
        with_it = row_space(torch.cat([others, concept.name]), self.config.guard_tolerance)
        return len(with_it) - len(row_space(others, self.config.guard_tolerance))

    def _rows_without(self, name: str | None) -> Tensor:
        """The rows of all that is guarded exactly, but for a name, if any."""
        return torch.cat([self._hard_rows, *(kept for other, kept in self._kept.items() if other != name)])

    @property
    def _null(self) -> Tensor:
        """N of a concept whose name is not guarded exactly; made once for all of them."""
        if self._null_of is None or self._null_of[0] != len(self._kept):
            self._null_of = len(self._kept), null_space(self._rows_without(None), self.config.guard_tolerance)
        return self._null_of[1]


def _energy(embeddings: Tensor, so_far: Tensor | None = None) -> Tensor:
    """Add up the mean outer products (d, d), float64, of each name's tokens (n_names, n_tokens, d)."""
    tokens = rows(embeddings).double()
    before = tokens.new_zeros(()) if so_far is None else so_far
    return torch.addmm(before, tokens.T, tokens, alpha=1 / embeddings.shape[1])
