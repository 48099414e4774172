"""What acts on a call: the edit at each door, and the changes behind Linears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.doors.family import TOKENS
from sepme_diffusers.runtime.erased_sets import Key
from sepme_diffusers.runtime.stack import ActiveStack


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """The active increments of a call, by the places where they act. An `Edit` of a denoiser.

    Per-module increments read the unedited embedding, as text-side ones do, so that they add up.

    Args:
        doors: Text-side increments, by door.
        module: Per-module increments; they read at the first door and act behind Linears.
        rows: How many pictures a batch must have, where each was named. Default: any number that the masks fit.
    """

    doors: Mapping[str, ActiveStack]
    module: ActiveStack | None = None
    rows: int | None = None

    @property
    def at_linears(self) -> bool:
        """Whether there are per-module increments."""
        return self.module is not None

    def edit(self, embeddings: Mapping[str, Tensor], pictures: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """The edited embeddings by door, and what per-module increments read.

        Raises:
            ErasureNotInForce: If the pass does not bring an embedding that an active increment edits, or another
                number of pictures than were named.
        """
        if self.rows not in (None, pictures):
            raise ErasureNotInForce(
                f"mixed_calls was given {self.rows} rows for a batch of {pictures}; it needs one for each row of the "
                "batch, also for each row of guidance"
            )
        if missing := [door for door in self.doors if door not in embeddings]:
            raise ErasureNotInForce(f"the pass brought no embedding for the doors {missing}, where increments act")
        edited = {door: stack.edited(embeddings[door], pictures) for door, stack in self.doors.items()}
        return edited, None if self.module is None else self.module.read(embeddings[TOKENS], pictures)

    def change(self, name: str, reading: Any) -> Tensor:
        """What the per-module increments add to the output of a Linear."""
        if self.module is None:
            raise ErasureNotInForce(f"no per-module increment is active, but one was asked for behind {name}")
        return self.module.change(reading, name)

    def note_opened(self, other: ActiveSet, row: int, picture: int, keys: Iterable[Key]) -> None:
        """Note the gates that opened for a row of another set as those of a picture of this one."""
        for mine in self.stacks():
            for theirs in other.stacks():
                mine.note_opened(theirs, row, picture, keys)

    def stacks(self) -> list[ActiveStack]:
        """Every stack with its mask."""
        return [*self.doors.values(), *([] if self.module is None else [self.module])]
