"""What one concept reads of a prompt at each door, and whether it acts on it."""

from __future__ import annotations

from dataclasses import dataclass

from sepme_diffusers.text.encoding import TOKENS


@dataclass(frozen=True)
class DoorReading:
    """What a concept's increment reads of a prompt at one door.

    Args:
        door: "tokens", or a further door of the denoiser such as "pooled".
        reading: What it reads of the token that it reads most, max_t ‖e_t Aᵀ‖; a gate is compared with this.
        gate: What it must read at least to act; None if it has no gate.
        open: Whether it may act: the gate is reached, or the prompt spells the concept, or there is no gate.
        word: The word of the prompt of which it reads most, where the tokenizer tells. The end of a prompt and the
            padding behind it, which carry all that was said, may be read more.
    """

    door: str
    reading: float
    gate: float | None
    open: bool
    word: str | None = None

    @property
    def acts(self) -> bool:
        """Whether it changes the embedding at this door: it may act, and there is something that it reads."""
        return self.open and self.reading > 0

    @property
    def nearness(self) -> float:
        """The reading as a share of the gate; the reading itself where there is no gate."""
        return self.reading if self.gate is None else self.reading / self.gate


@dataclass(frozen=True)
class ConceptReading:
    """What a concept reads of a prompt, and what follows.

    Args:
        concept: Its name, as `erasable` has it.
        doors: What it reads at each door, the tokens first.
        spelled: Those of its names that the prompt spells. If it has a gate, one of them opens it.
        strength: At which a call without a set of its own erases it; 0 if such a call does not.
        always: Whether every call erases it, whatever the call says.
    """

    concept: str
    doors: tuple[DoorReading, ...]
    spelled: tuple[str, ...] = ()
    strength: float = 0.0
    always: bool = False

    @property
    def erased(self) -> bool:
        """Whether a call without a set of its own erases it."""
        return self.strength > 0

    @property
    def acts(self) -> bool:
        """Whether it changes what the denoiser is told of this prompt, in a call that erases it."""
        return any(door.acts for door in self.doors)

    @property
    def nearness(self) -> float:
        """Of the door where it is nearest to acting, see `DoorReading.nearness`."""
        return max(door.nearness for door in self.doors)

    @property
    def reason(self) -> str:
        """Why it acts, or does not, in a few words."""
        door = max(self.doors, key=lambda door: (door.acts, door.nearness))
        where = "" if door.door == TOKENS else f" at the door {door.door!r}"
        if not door.reading:
            return f"reads nothing{where}"
        if door.gate is None:
            return f"reads {door.reading:.3g}{where}, it has no gate"
        if door.open and door.reading < door.gate and self.spelled:
            return "it is spelled" if self.concept in self.spelled else f"it is spelled {self.spelled[0]!r}"
        return f"reads {door.reading:.3g}{where}, its gate is {door.gate:.3g}"

    @property
    def verdict(self) -> str:
        """Say in a few words what it does, and why."""
        does = "acts" if self.acts else "does not"
        if not self.erased:
            does = "would act if erased" if self.acts else "would not"
        return f"{self.concept} {does} ({self.reason})"

    def cells(self) -> list[tuple[str, ...]]:
        """Return its lines of a table, one for each door."""
        strength = "" if self.strength in (0.0, 1.0) else f" x {self.strength:g}"
        erased = ("always" if self.always else "yes") + strength if self.erased else "no"
        acts = ("yes" if self.erased else "if erased") if self.acts else "no"
        first = (self.concept, erased, acts, ", ".join(self.spelled))
        return [
            (
                *(first if door is self.doors[0] else ("",) * len(first)),
                *(door.door, f"{door.reading:.3g}", "none" if door.gate is None else f"{door.gate:.3g}"),
                door.word or "",
            )
            for door in self.doors
        ]
