"""Calibration in text space: how strongly regular prompts weigh, and from which reading on an increment acts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.utils import logging
from torch import Tensor
from torch.distributions import Binomial

from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.names import some

logger = logging.get_logger(__name__)

WEIGHTS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""The weights of regular prompts that a calibrated one is chosen from."""
# Of so many prompts on, every fifth is held out: the increment is not made for it.
ENOUGH, _EVERY = 10, 5
# Separations that differ by less than this share are one: then regular prompts weigh more, also those in no list.
_AS_GOOD = 1.1
# So many of its own prompts a gate may leave shut: those that hardly read of the concept, as where it is named last of
# three, and do not spell it either.
_MAY_MISS = 0.1
# Where the gate stands between the largest reading of a regular prompt (0) and that of own prompts (1). Beyond the
# middle: regular prompts that are in no list read up to half of what own prompts do, and own ones seldom less.
_PLACE = 2 / 3
# So many prompts that are not told from regular ones a warning names.
_SHOWN = 3
# One-sided confidence of the bound of the share of regular prompts that open a gate.
_CONFIDENCE = 0.95


def made_for(n_prompts: int) -> list[int]:
    """Return the indices of the prompts that an increment is made for; the others are held out for its gate.

    Args:
        n_prompts: How many prompts show the concept. None is held out of fewer than ten.
    """
    held_out = set(range(_EVERY - 1, n_prompts, _EVERY)) if n_prompts >= ENOUGH else set()
    return [index for index in range(n_prompts) if index not in held_out]


@dataclass(frozen=True, eq=False)
class RegularRows:
    """The token rows of regular prompts that no increment is made for, each row once.

    Args:
        rows: (m, d).
        where: Which of them the tokens of each prompt are, (n_prompts, n_tokens).
    """

    rows: Tensor
    where: Tensor

    @classmethod
    def of(cls, embeddings: Tensor) -> RegularRows:
        """Keep each row of embeddings (n_prompts, n_tokens, d) once: those of the start and of a template repeat."""
        rows, where = torch.unique(embeddings.flatten(0, -2), dim=0, return_inverse=True)
        return cls(rows, where.reshape(embeddings.shape[:-1]))

    def only(self, prompts: Sequence[int]) -> RegularRows:
        """Keep these of the prompts, by index."""
        return RegularRows(self.rows, self.where[list(prompts)])

    def joined(self, *others: RegularRows) -> RegularRows:
        """Join the prompts of all."""
        where, rows_before = [self.where], len(self.rows)
        for other in others:
            where.append(other.where + rows_before)
            rows_before += len(other.rows)
        return RegularRows(torch.cat([self.rows, *(other.rows for other in others)]), torch.cat(where))

    def readings(self, increment: Increment) -> Tensor:
        """Return what an increment reads in each prompt, (n_prompts,): max_t ‖e_t Aᵀ‖."""
        a = increment.A.to(self.rows)
        return (self.rows @ a.T).norm(dim=-1)[self.where].amax(dim=1)


def best_weight(
    solved: Callable[[float], Increment], own: Tensor, regular: RegularRows, weights: Sequence[float] = WEIGHTS
) -> float:
    """Choose how strongly regular prompts weigh: so that they read the least share of what own prompts read.

    It is the largest reading of a regular prompt as a share of what half of the own prompts read at least: in some of
    them the text encoder hardly sees the concept, whatever is solved for. Of weights that do about as well it is the
    largest.

    Args:
        solved: Solves for the increment with a weight.
        own: Embeddings of prompts that show the concept, held-out ones included, (n_prompts, n_tokens, d).
        regular: Regular prompts.
        weights: To choose from, rising.
    """
    shares = {}
    for weight in weights:
        increment = solved(weight)
        shares[weight] = float(regular.readings(increment).max() / increment.reading(own).median().clamp(min=1e-30))
    best = min(shares.values())
    return max(weight for weight, share in shares.items() if share <= _AS_GOOD * best)


def calibrated(
    increment: Increment,
    own: Tensor,
    regular: RegularRows,
    what: str,
    spelled: Tensor | None = None,
    prompts: Sequence[str] = (),
) -> tuple[Increment, dict[str, float]]:
    """Set the gate between what own prompts and what regular prompts read.

    The own prompts that read more than any regular prompt are told from them. The gate stands two thirds of the way
    from the largest reading of a regular prompt to what nine tenths of these read at least. Of the others those open
    it that spell the concept. Where more than a tenth of the own prompts neither are told from regular ones nor spell
    the concept, there is no gate: the increment acts on everything in proportion to what it reads, and a warning says
    so.

    Args:
        increment: Text-side or per-module; gates of further doors stay as they are.
        own: Embeddings of the concept's own prompts, held-out ones included, (n_prompts, n_tokens, d).
        regular: Regular prompts.
        what: The concept's name, for the warning.
        spelled: Which of the own prompts open any gate because they spell the concept, (n_prompts,). Default: none.
        prompts: The own prompts, for the warning.

    Returns:
        The increment, and metrics: `own_reading` is what nine tenths of the own prompts read at least that are told
        from regular ones, and `own_reached` the share of own prompts that read as much as the gate, so that it opens
        where the text is not known as well; `regular_reading` is the largest of a regular prompt,
        `regular_moved` the share of regular prompts that move, of `regular_prompts`, and `regular_bound` what the
        true share is below with a confidence of 95 %.

    Raises:
        ValueError: If the increment reads nothing in any of its own prompts.
    """
    of_own, of_regular = increment.reading(own), regular.readings(increment)
    if not float(of_own.max()) > 0:
        raise ValueError(f"the increment of {what!r} reads nothing in its own prompts, so it has no gate")
    most, told_apart = float(of_regular.max()), of_own > of_regular.max()
    low = float(of_own[told_apart].quantile(_MAY_MISS)) if told_apart.any() else most / _PLACE
    missed = ~told_apart if spelled is None else ~(told_apart | spelled.to(told_apart))
    gate = most + _PLACE * (low - most) if float(missed.float().mean()) <= _MAY_MISS else None
    if gate is None:
        least_first = [prompts[index] for index in of_own.argsort().tolist() if missed[index]] if prompts else []
        such = f", such as {some(least_first, _SHOWN)}" if least_first else ""
        logger.warning(
            f"no gate for {what!r}: {float(missed.float().mean()):.0%} of its own prompts read less than some regular "
            f"prompt and do not spell it{such}. So it acts on all prompts, in proportion to what it reads. Give it "
            "aliases that mean nothing else, describe it with pairs of prompts of your own, or take prompts that "
            "resemble it out of the regular ones"
        )
    moved = int((of_regular > (gate or 0.0)).sum())
    return replace(increment, gate=gate), {
        "own_reading": low,
        "own_reached": float((of_own > (gate or 0.0)).float().mean()),
        "regular_reading": most,
        "regular_moved": moved / len(of_regular),
        "regular_prompts": len(of_regular),
        "regular_bound": share_bound(moved, len(of_regular)),
    }


def share_bound(count: int, of: int, confidence: float = _CONFIDENCE) -> float:
    """Return what a share is below with some confidence, if `count` of so many random cases were seen.

    The one-sided bound of Clopper and Pearson: the share at which so few or fewer would be seen in 1 − confidence of
    all samples. Of 300 cases and none seen it is about 1 %, of 600 about 0.5 %.

    Args:
        count: Cases that were seen.
        of: Cases in all.
        confidence: Between 0 and 1.

    Source: Clopper and Pearson, Biometrika 26 (1934).

    Example:
        >>> round(share_bound(0, 600), 4)
        0.005
    """
    if count >= of:
        return 1.0
    cases = torch.arange(count + 1, dtype=torch.float64)
    low, high = count / of, 1.0
    for _ in range(50):
        share = torch.tensor((low + high) / 2, dtype=torch.float64)
        seldom = Binomial(of, share).log_prob(cases).exp().sum() < 1 - confidence
        low, high = (low, float(share)) if seldom else (float(share), high)
    return high
