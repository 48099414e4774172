"""Guards: what an increment may not change, what it should change little, and how much room that leaves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers.utils import logging
from torch import Tensor

from sepme_diffusers.algebra.subspace import null_space, row_space
from sepme_diffusers.bank.guard_sets import GuardSet
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import Encoded, rows

logger = logging.get_logger(__name__)

# Below this share of its embedding, what the guards leave of a concept is rounding.
_LEAST_REACH = 1e-4
# Two prompts whose embeddings differ by less than this share are one prompt to the text encoder.
_SAME = 1e-6


@dataclass(frozen=True)
class Capacity:
    """How much room there is for an increment, known before it is made.

    Dimensions and reach are of the tokens. A further door has room for as many prompts as it is wide.

    Args:
        concept: What would be erased.
        dimensions: d, the width of the text embedding.
        dimensions_left: How many of these an increment of the concept may use.
        dimensions_taken: How many its name takes from every other increment that guards it exactly.
        exact: Whether the names of the other concepts are guarded exactly, at every door. If not they are damped.
        reach: ‖E P‖ / ‖E‖, the share of the concept's embedding that an increment can touch.
        leakage: The largest share ‖e ΔWᵀ‖ / ‖e Wᵀ‖ by which its closed-form increment moves another name.
    """

    concept: str
    dimensions: int
    dimensions_left: int
    dimensions_taken: int
    exact: bool
    reach: float
    leakage: float


class Guards:
    """The guards of the increments of one bank.

    As long as the names of all concepts leave room, every increment guards every other concept's name exactly. Beyond
    that, names are damped: an increment pays for moving them. The prompts listed as guards are always exact.

    Args:
        encoded: Embeddings of prompts.
        hard: Prompts that no increment may change.
        names: The concepts' names.
        config: `guard_tolerance`, `reserve`, `name_weight`.
    """

    def __init__(self, encoded: Encoded, hard: Sequence[str], names: Iterable[str], config: SepMEConfig) -> None:
        self.encoded, self.hard, self.config = encoded, tuple(hard), config
        self.names = tuple(name for name in names if name not in self.hard)
        self.width = encoded(self.hard).shape[-1]
        room = int((1 - config.reserve) * self.width)
        guarded = row_space(rows(encoded((*self.hard, *self.names))), config.guard_tolerance)
        self.exact = not self.names or len(guarded) <= room
        if not self.exact:
            logger.warning(
                f"guards and the names of {len(self.names)} concepts take {len(guarded)} of {self.width} "
                f"dimensions, and reserve={config.reserve:g} keeps {self.width - room} free: names are damped, not "
                "guarded exactly; what they leak is measured and stored in the bank"
            )

    def prompts(self, concept: Concept) -> tuple[str, ...]:
        """Return what an increment of the concept guards: the hard prompts, and every name but its own."""
        return (*self.hard, *(name for name in self.names if name != concept.name))

    def guard_set(self, exact: bool, known: Iterable[GuardSet] = ()) -> GuardSet:
        """Return what every increment of the bank guards, as an extension of a known set where that is possible.

        Args:
            exact: Whether names are guarded exactly, at every door.
            known: The bank's sets.
        """
        if exact:
            return GuardSet.of((*self.hard, *self.names), (), known)
        return GuardSet.of(self.hard, self.names, known)

    @property
    def damped(self) -> tuple[str, ...]:
        """The names that are not guarded exactly."""
        return () if self.exact else self.names

    def null(self, concept: Concept) -> Tensor:
        """Return N, orthonormal rows (k, d) of what an increment of the concept may use."""
        return self._exact_null(concept) if self.exact else self._hard_null

    def penalty(self, concept: Concept, null: Tensor, soft: Tensor | None = None) -> Tensor | None:
        """Return N P Nᵀ (k, k), float64: what moving damped names and regular prompts costs; None for nothing.

        Args:
            concept: The concept.
            null: N, its `null`, (k, d); the penalty is on the same device.
            soft: What moving regular prompts costs, weighted, (d, d).
        """
        names = None if self.exact else self._name_penalty(concept).to(null)
        if soft is None:
            return names
        regular = null @ soft.to(null) @ null.T
        return regular if names is None else regular + names

    def _name_penalty(self, concept: Concept) -> Tensor:
        """The weighted outer products (k, k) of damped names' tokens in the null space, summed over names."""
        energy = self._energy_of_names
        if concept.name in self.names:
            own = rows(self.encoded([concept.name])).double() @ self._hard_null.T
            energy = energy - own.T @ own / len(own)
        return self.config.name_weight * energy

    def refuse_unreachable(self, concept: Concept) -> float:
        """Check that an increment can touch some of the concept's embedding, and return the share ‖E P‖ / ‖E‖.

        Raises:
            ValueError: If it cannot. If a guard is the same prompt to the text encoder, the message names it.
        """
        guarded, embeddings = self.encoded(self.prompts(concept)), self.encoded(concept.prompts)
        for prompt, embedding in zip(concept.prompts, embeddings, strict=True):
            # The last tokens alone tell nearly all prompts apart, and are no farther from each other than the wholes.
            least = _SAME * embedding.norm()
            alike = ((guarded[:, -1] - embedding[-1]).norm(dim=1) < least).nonzero().flatten().tolist()
            if same := [index for index in alike if (guarded[index] - embedding).norm() < least]:
                raise ValueError(
                    f"the prompt {prompt!r} of concept {concept.name!r} is to the text encoder the guard "
                    f"{self.prompts(concept)[same[0]]!r}: no dimension is left to tell them apart; drop one of them"
                )
        embeddings = rows(embeddings).double()
        reach = float((embeddings @ self.null(concept).T).norm() / embeddings.norm())
        if reach < _LEAST_REACH:
            raise ValueError(
                f"the {len(self.prompts(concept))} guard prompts fill the space that {concept.name!r} lives in (reach "
                f"{reach:.1e}): nothing can be erased; guard fewer prompts, or move some of them to the soft guards"
            )
        return reach

    def dimensions_taken(self, concept: Concept) -> int:
        """Return how many dimensions the concept's name takes from each increment that guards it exactly."""
        with_it = row_space(rows(self.encoded((*self.prompts(concept), concept.name))), self.config.guard_tolerance)
        without = row_space(rows(self.encoded(self.prompts(concept))), self.config.guard_tolerance)
        return len(with_it) - len(without)

    def _exact_null(self, concept: Concept) -> Tensor:
        return null_space(rows(self.encoded(self.prompts(concept))), self.config.guard_tolerance)

    @cached_property
    def _hard_null(self) -> Tensor:
        return null_space(rows(self.encoded(self.hard)), self.config.guard_tolerance)

    @cached_property
    def _energy_of_names(self) -> Tensor:
        """Of all names, so that it is computed once for all concepts."""
        tokens = self.encoded(self.names).double()
        outside = torch.einsum("nti,ntj->ij", tokens, tokens) / tokens.shape[1]
        return self._hard_null @ outside @ self._hard_null.T
