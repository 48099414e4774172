"""What a call erases: its own set or a default, and what is always erased."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.runtime.erased_sets import Key, Strengths, UnknownConceptError, with_floors
from sepme_diffusers.runtime.snapshot import Snapshot

ErasedSet = Iterable[str] | Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Request:
    """What applies to the calls of one light copy of a pipeline, see `SepMELoaderMixin.for_request`.

    Args:
        always: Erased in every call.
        default: Erased in calls without a set of their own. Default: the standing set.
    """

    always: Strengths = field(default_factory=dict)
    default: Strengths | None = None


def strengths_of(concepts: ErasedSet, snapshot: Snapshot) -> dict[Key, float]:
    """Look up an erased set, by name or {name: strength}, in what is loaded.

    Raises:
        TypeError: If a single string is given, or a name is no string.
        UnknownConceptError: If a name is unknown or stands for several concepts, or nothing is loaded.
        ValueError: If a name is given twice, or a strength is not a number from 2^-20 to 2^10.
    """
    if snapshot.banks:
        return snapshot.names.strengths(concepts)
    if not isinstance(concepts, str) and not list(concepts):
        return {}
    raise UnknownConceptError(f"cannot erase {concepts!r}: no bank is loaded; call load_sepme() first")


def floors(snapshot: Snapshot, request: Request) -> dict[Key, float]:
    """Return what every call erases: what loaded banks and the owner of the request always erase.

    Raises:
        ErasureNotInForce: If a bank that the request names has been unloaded since.
    """
    named = {**request.always, **(request.default or {})}
    if lost := ["/".join(key) for key in named if key not in snapshot.names.shown]:
        raise ErasureNotInForce(
            f"this copy of a pipeline was made by for_request() to erase {lost}, which is no longer loaded"
        )
    return with_floors(snapshot.floors, request.always)


def default_set(snapshot: Snapshot, request: Request) -> dict[Key, float]:
    """Return what a call without a set of its own erases. Raises as `floors` does."""
    chosen = snapshot.standing if request.default is None else request.default
    return snapshot.ordered(with_floors(chosen, floors(snapshot, request)))


def set_with_floors(concepts: ErasedSet | None, snapshot: Snapshot, request: Request) -> dict[Key, float]:
    """Return one erased set, None for the default, with what is always erased added. Raises as `sets_of_call` does."""
    if concepts is None:
        return default_set(snapshot, request)
    return snapshot.ordered(with_floors(strengths_of(concepts, snapshot), floors(snapshot, request)))


def sets_of_call(
    erased: Any, snapshot: Snapshot, request: Request, prompts: int, pictures_per_prompt: int = 1
) -> tuple[list[dict[Key, float]], bool]:
    """Return the erased set of each picture of a call, or one for all of them; and whether the call says each of them.

    It says a set itself or by the request's default; what has the standing set does not say it.

    Args:
        erased: What the call gave: None, one set, or a list with one set (or None) per prompt.
        snapshot: What is loaded.
        request: What applies to the pipeline's calls.
        prompts: How many prompts the call has.
        pictures_per_prompt: How many pictures it draws for each.

    Raises:
        TypeError, UnknownConceptError, ValueError: As `strengths_of`.
        ValueError: If there are not as many sets as prompts.
        ErasureNotInForce: As `floors`.
    """
    has_default = request.default is not None
    if erased is None:
        return [set_with_floors(None, snapshot, request)], has_default
    if not isinstance(erased, (str, Mapping)):
        erased = list(erased)  # looked at more than once: a generator must not run dry and erase nothing
    if isinstance(erased, (str, Mapping)) or all(isinstance(name, str) for name in erased):
        return [set_with_floors(erased, snapshot, request)], True
    if len(erased) != prompts:
        raise ValueError(f"{len(erased)} erased sets for {prompts} prompts; give one set per prompt, or one for all")
    own = [set_with_floors(concepts, snapshot, request) for concepts in erased]
    explicit = None not in erased or has_default
    if all(strengths == own[0] for strengths in own):
        return own[:1], explicit
    return [strengths for strengths in own for _ in range(pictures_per_prompt)], explicit
