"""Calls: what one call of a pipeline erases belongs to the call, whichever thread runs the denoiser."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.runtime.active import ActiveSet
from sepme_diffusers.runtime.erased_sets import Strengths
from sepme_diffusers.runtime.snapshot import Snapshot

if TYPE_CHECKING:
    from sepme_diffusers.runtime.erasures import Erasures


# What a thread runs at the moment: `record`, and the records `before` it. torch.compile traces a `threading.local`,
# and no ContextVar.
_thread = threading.local()


class Call:
    """One call of a pipeline: what it erases, and what was seen of it.

    A pass of the denoiser belongs to the call whose record is open in its thread. `with call:` opens the record of a
    running call in another thread, a worker that runs the denoiser for it.

    Args:
        erasures: Of the pipeline's denoisers.
        snapshot: What was loaded when the call began.
        sets: The erased set of each picture, or one for all of them; floors are in it.
        active: What acts.
        own: Whether the set is the call's own, not the standing one.
        pictures: How many pictures the call draws, as far as that is known.
        unedited: Whether it is no call of a pipeline but work on the original model, see `erasures.unedited`.
        least: What a reading must exceed to count, see `stack.ActiveStack`.
        fixed_shape: Whether the denoiser is compiled, see `snapshot.Stacks.get`.
    """

    def __init__(
        self,
        erasures: Erasures,
        snapshot: Snapshot,
        sets: Sequence[Strengths],
        active: ActiveSet | None,
        own: bool,
        pictures: int = 1,
        unedited: bool = False,
        least: float = 0.0,
        fixed_shape: bool = False,
    ) -> None:
        self.erasures, self.snapshot, self.sets, self.active = erasures, snapshot, tuple(sets), active
        self.own, self.pictures, self.unedited = own, pictures, unedited
        self.least, self.fixed_shape = least, fixed_shape
        self.alive, self.ran = True, False

    def set_of(self, picture: int) -> Strengths:
        """The erased set of one picture."""
        return self.sets[picture if len(self.sets) > 1 else 0]

    def names(self) -> list[str]:
        """What should be erased, for messages."""
        shown = self.snapshot.names.shown
        return list(dict.fromkeys(shown[key] for strengths in self.sets for key in strengths))

    def note_pass(self) -> None:
        """Remember that a denoiser ran for this call."""
        self.ran = True

    def __enter__(self) -> Call:
        now = record_of_thread()
        if not self.alive:
            raise ErasureNotInForce(
                f"the call that erases {self.names()} has ended; its record cannot be opened again"
            )
        if now is not None and now is not self and now.alive:
            raise ErasureNotInForce(
                "another call's record is open in this thread, so it is not known which rows of a batch belong to "
                "which call; open mixed_calls([...]) with one row of a call per row of the batch"
            )
        _thread.before = [*getattr(_thread, "before", []), now]
        _thread.record = self
        for attachment in self.erasures.attachments:
            attachment.prepare_thread()
        return self

    def __exit__(self, *error: object) -> None:
        _thread.record = _thread.before.pop()


class _Mixed(Call):
    """Pictures of several calls in one batch."""

    def __init__(self, parts: Sequence[tuple[Call, int]]) -> None:
        calls = list(dict.fromkeys(call for call, _ in parts))
        first = calls[0]
        if any(
            call.snapshot.stacks is not first.snapshot.stacks or call.erasures is not first.erasures for call in calls
        ):
            raise ErasureNotInForce(
                "calls that began before and after a change of the loaded banks cannot share a batch"
            )
        sets = [call.set_of(picture) for call, picture in parts]
        least, fixed_shape = max(call.least for call in calls), any(call.fixed_shape for call in calls)
        active = first.snapshot.active(sets, len(sets), fixed_shape, least)
        super().__init__(first.erasures, first.snapshot, sets, active, True, len(sets))
        self.calls = calls

    def note_pass(self) -> None:
        if dead := [call.names() for call in self.calls if not call.alive]:
            raise ErasureNotInForce(f"calls of this batch have ended: those that erase {dead}")
        for call in self.calls:
            call.ran = True


def current_call() -> Call:
    """Return the call that this thread runs, to carry it into another thread: `with call:` there.

    Raises:
        ErasureNotInForce: If this thread runs no call of an attached pipeline.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, current_call, pocket
        >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
        >>> pipe.load_sepme(pocket.bank("styles"))
        >>> seen = []
        >>> def note(pipe, step, timestep, tensors):
        ...     seen.append(current_call().names())
        ...     return tensors
        >>> _ = pipe("a cat", erased=["neon"], num_inference_steps=1, callback_on_step_end=note)
        >>> seen
        [['neon']]
    """
    record = record_of_thread()
    if record is None or not record.alive:
        raise ErasureNotInForce("no call of an attached pipeline runs in this thread")
    return record


def mixed_calls(rows: Sequence[tuple[Call, int]]) -> Call:
    """Return a record for a batch whose rows belong to several calls; `with` it, a micro-batcher runs the pass.

    Args:
        rows: For each picture of the batch its call, and which picture of the call it is.

    Raises:
        ErasureNotInForce: If the calls began with different banks.
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("a batch has at least one row")
    return _Mixed(list(rows))


def record_of_thread() -> Call | None:
    """The record that is open in this thread."""
    return getattr(_thread, "record", None)


@contextmanager
def opened(call: Call) -> Iterator[Call]:
    """While the block runs, a call's record is open in this thread; afterwards the record is dead."""
    before = record_of_thread()
    _thread.record = call
    try:
        yield call
    finally:
        call.alive = False
        _thread.record = before


def following() -> Any:
    """What acts on a pass of a ControlNet: what acts on the call that it is part of; outside a call nothing."""
    record = record_of_thread()
    return None if record is None or not record.alive else record.active
