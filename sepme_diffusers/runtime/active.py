"""What acts on a call: the edit at each door, and the changes behind Linears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.doors.family import TOKENS
from sepme_diffusers.runtime.erased_sets import Key
from sepme_diffusers.runtime.remembered import Edited, Reading, Remembered
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
    remembered: Remembered = field(default_factory=Remembered, init=False)

    @property
    def at_linears(self) -> bool:
        """Whether there are per-module increments."""
        return self.module is not None

    def edit(self, embeddings: Mapping[str, Tensor], pictures: int) -> Edited:
        """Return the edited embeddings by door, and what per-module increments read.

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
        if not self.remembered.applies(embeddings):
            return self._edited(embeddings, pictures, None)
        known = self.remembered.recall(embeddings, pictures)
        if known is None:
            known = self._edited(embeddings, pictures, {})
            self.remembered.keep(embeddings, pictures, known)
        return known

    def _edited(self, embeddings: Mapping[str, Tensor], pictures: int, changes: dict[str, Tensor] | None) -> Edited:
        edited = {door: stack.edited(embeddings[door], pictures) for door, stack in self.doors.items()}
        if self.module is None:
            return edited, None
        return edited, Reading(self.module.read(embeddings[TOKENS], pictures), changes)

    def change(self, name: str, reading: Reading) -> Tensor:
        """Return what the per-module increments add to the output of a Linear."""
        if self.module is None:
            raise ErasureNotInForce(f"no per-module increment is active, but one was asked for behind {name}")
        if reading.changes is not None and name in reading.changes:
            return reading.changes[name]
        change = self.module.change(reading.values, name)
        reading.remember(name, change)
        return change

    @cached_property
    def at_doors(self) -> ActiveSet | None:
        """What of it acts on a denoiser that helps: it has no text Linears to which per-module increments belong."""
        return ActiveSet(self.doors, rows=self.rows) if self.doors else None

    def copy_to(self, device: torch.device) -> None:
        """Copy everything to a device, so that no pass has to."""
        for stack in self.stacks():
            stack.copy_to(device)

    def forget(self) -> None:
        """Forget the edits that are remembered, here and for helpers."""
        self.remembered.forget()
        if self.at_doors is not None:
            self.at_doors.remembered.forget()

    def note_opened(self, other: ActiveSet, row: int, picture: int, keys: Iterable[Key]) -> None:
        """Note the gates that opened for a row of another set as those of a picture of this one."""
        for mine in self.stacks():
            for theirs in other.stacks():
                mine.note_opened(theirs, row, picture, keys)

    def stacks(self) -> list[ActiveStack]:
        """Return every stack with its mask."""
        return [*self.doors.values(), *([] if self.module is None else [self.module])]
