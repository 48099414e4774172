"""What a bank holds: entries, what they were made on, and what is promised of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

from torch import Tensor

from sepme_diffusers.bank.fingerprint import Encoding, Fingerprint
from sepme_diffusers.bank.guard_sets import Guarded, GuardSet
from sepme_diffusers.bank.rows import as_rows, digest
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import TOKENS
from sepme_diffusers.text.names import some

# What an erasure should reach of its own prompts, and the most that it should move of regular ones.
_LEAST_REACHED, _MOST_MOVED = 0.5, 0.005


class Outline(Protocol):
    """What is known of an entry without its numbers. An `Entry` is one, and what stands for an entry on the disk.

    Attributes:
        form: "text" or "module".
        ranks: {door: r}, the tokens' first.
        gates: {door: gate} of the doors that have one.
        guards: The prompts that it leaves alone.
        spellings: The names by which a prompt spells the concept.
        metrics: What was measured.
        digest: SHA-256 of the increment, see `rows.digest`.
        increment: The numbers; read when they are asked for.
        bases: {door: A}, what the increment reads of an embedding, for a first look; not checked on the disk.
    """

    @property
    def form(self) -> Literal["text", "module"]: ...
    @property
    def ranks(self) -> Mapping[str, int]: ...
    @property
    def gates(self) -> Mapping[str, float]: ...
    @property
    def guards(self) -> Guarded: ...
    @property
    def spellings(self) -> tuple[str, ...]: ...
    @property
    def metrics(self) -> Mapping[str, Any]: ...
    @property
    def digest(self) -> str: ...
    @property
    def increment(self) -> Increment: ...
    @property
    def bases(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Entry:
    """One erasure of a bank. Immutable.

    Args:
        concept: What it erases.
        increment: How.
        config: The settings it was made with.
        guard_set: The prompts that it leaves as they were, but for its concept's own name. Other entries share it.
        metrics: Anything measured about it (steps, leakage ...), plain JSON values.
        adapter: The increment that stands for it where there is no gate, as in a LoRA: solved once more without one.
            What it leaks is `metrics["adapter_leakage"]`. Default: the increment, without its gate.
    """

    concept: Concept
    increment: Increment
    config: SepMEConfig
    guard_set: GuardSet
    metrics: Mapping[str, Any] = field(default_factory=dict)
    adapter: Increment | None = None

    @property
    def guards(self) -> Guarded:
        """The prompts that it leaves as they were."""
        return Guarded(self.guard_set, self.concept.name)

    @property
    def spellings(self) -> tuple[str, ...]:
        """The names by which a prompt spells the concept."""
        return self.concept.spellings

    def renamed(self, name: str) -> Entry:
        """Call the concept otherwise. What it guards stays the same: its former name is not one of its guards.

        Args:
            name: The new name.

        Raises:
            ValueError: If it is not usable, see `Concept`.
        """
        guards = GuardSet(tuple(self.guards.exact), tuple(self.guards.damped))
        return replace(self, concept=replace(self.concept, name=name), guard_set=guards)

    @property
    def exact_guards(self) -> tuple[str, ...]:
        """The guards that it claims to leave exactly as they were."""
        return exact_guards(self)

    @property
    def form(self) -> Literal["text", "module"]:
        """The increment's form."""
        return self.increment.form

    @property
    def bases(self) -> dict[str, Tensor]:
        """{door: A}, what the increment reads of an embedding."""
        return {TOKENS: self.increment.A} | {door: part.A for door, part in self.increment.doors.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """{door: r}, the tokens' first."""
        return {TOKENS: self.increment.rank} | {door: part.rank for door, part in self.increment.doors.items()}

    @property
    def gates(self) -> dict[str, float]:
        """{door: gate} of the doors that have one."""
        parts = {TOKENS: self.increment, **self.increment.doors}
        return {door: part.gate for door, part in parts.items() if part.gate is not None}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the increment, see `rows.digest`."""
        return digest(as_rows(self.increment))

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against it: it reaches too few of its prompts, moves too many others, has names that are cut."""
        reached, moved, cut = (self.metrics.get(key) for key in ("own_reached", "regular_moved", "aliases_cut"))
        doubts = []
        if reached is not None and reached < _LEAST_REACHED:
            doubts.append(
                f"{self.concept.name!r} opens its gate in {reached:.0%} of its own prompts only; prompts that spell "
                "its name or an alias open it all the same. Give it aliases, or pairs of prompts that show it plainly"
            )
        if moved is not None and moved > _MOST_MOVED:
            doubts.append(
                f"erasing {self.concept.name!r} moves {moved:.1%} of the regular prompts; take prompts that resemble "
                "it out of them, or describe it with more prompts"
            )
        if cut:
            doubts.append(
                f"{self.concept.name!r} has names that are longer than the text encoder reads, and was not made for "
                f"them: {some(cut, 3)}. A prompt that spells one opens its gate all the same; give shorter aliases"
            )
        return tuple(doubts)


def exact_guards(outline: Outline) -> tuple[str, ...]:
    """Return the guards that an entry claims to leave exactly as they were: it reads nothing of them."""
    leaks = outline.metrics.get("leakage_of", {})
    return tuple(prompt for prompt in outline.guards.exact if prompt not in leaks)


def has_exact_guard(outline: Outline) -> bool:
    """Tell whether an entry claims to leave any guard exactly as it was."""
    leaks = outline.metrics.get("leakage_of", {})
    return any(prompt not in leaks for prompt in outline.guards.exact)


@dataclass(frozen=True)
class BaseModel:
    """What a bank was made on.

    Args:
        name: Id or folder of the base model.
        doors: How text becomes an embedding, by the door at which it enters the denoiser; the tokens' is one.
        vocabularies: {tokenizer: SHA-256 of its vocabulary}.
        projections: {module name: (d_out, Frobenius norm of W_m)} of the text projections of the denoiser, which tells
            its weights from another's. None if it is not known; per-module increments need it.

    Raises:
        ValueError: If it has no door for tokens.
    """

    name: str
    doors: Mapping[str, Encoding]
    vocabularies: Mapping[str, str] = field(default_factory=dict)
    projections: Mapping[str, tuple[int, float]] | None = None

    def __post_init__(self) -> None:
        if TOKENS not in self.doors:
            raise ValueError(f"a base has a door {TOKENS!r}; this one has {list(self.doors)}")

    @property
    def width(self) -> int:
        """d of the text embedding."""
        return self.doors[TOKENS].width

    @property
    def n_tokens(self) -> int:
        """The tokens of a prompt."""
        return self.doors[TOKENS].n_tokens

    def completed_by(self, other: BaseModel) -> BaseModel:
        """Take from another description of the same base what this one does not know."""
        projections = self.projections if self.projections is not None else other.projections
        return replace(
            self,
            doors={**other.doors, **self.doors},
            vocabularies={**other.vocabularies, **self.vocabularies},
            projections=projections,
        )

    @property
    def fingerprint(self) -> Fingerprint:
        """What tells this base from another."""
        return Fingerprint(self.doors, self.vocabularies, self.projections)


@dataclass(frozen=True)
class Guarantee:
    """What a bank promises for a guarded prompt.

    Args:
        by: Why its picture stays as it was whatever is erased; None where it does not, or nothing is promised.
            "null space": no increment reads anything of it, to the bit where guards were made at 1e-6. "gate": what
            some read of it leaves their gate shut.
        leakage: If it is moved: the largest share of its embedding (of its keys and values, for per-module increments)
            by which one increment moves it, measured when the increment was made.
        unaware: Concepts of the bank whose increments do not guard the prompt (made before it was known, say):
            nothing is promised while one of these is erased.
        margin: Of one that is kept by gates: the share of each gate that it leaves, at least.
    """

    by: Literal["null space", "gate"] | None
    leakage: float
    unaware: tuple[str, ...]
    margin: float | None = None

    @property
    def exact(self) -> bool:
        """Whether its picture stays as it was whatever is erased."""
        return self.by is not None


@dataclass(frozen=True)
class Origin:
    """What a bank knows of the Hub repository that it came from, to notice what others push meanwhile. Immutable.

    Args:
        repository: Its id.
        always: The policy as it was pulled.
        outlines: What stood for each entry as it was pulled or pushed. What is another object now was changed since.
        records: {concept name: its record in the manifest on the Hub}, as last seen.
    """

    repository: str
    always: tuple[str, ...]
    outlines: Mapping[str, Outline]
    records: Mapping[str, Any]
