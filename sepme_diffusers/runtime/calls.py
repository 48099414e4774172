"""Calls: what one call of a pipeline erases belongs to the call, whichever thread runs the denoiser."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sepme_diffusers.doors.attachment import Attachment, ErasureNotInForce
from sepme_diffusers.runtime.active import ActiveSet
from sepme_diffusers.runtime.erased_sets import Key, Strengths
from sepme_diffusers.runtime.snapshot import Snapshot
from sepme_diffusers.runtime.spelled import Spelled

# What a thread runs at the moment: `record`, and the records `before` it. torch.compile traces a `threading.local`,
# and no ContextVar.
_thread = threading.local()


class Call:
    """One call of a pipeline: what it erases, and what was seen of it.

    A pass of the denoiser belongs to the call whose record is open in its thread. `with call:` opens the record of a
    running call in another thread, a worker that runs the denoiser for it. Where the call's pictures have different
    sets, a worker names the rows of its batch instead, see `mixed_calls`.

    Args:
        attachments: Of the pipeline's denoisers that draw.
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
        attachments: tuple[Attachment, ...],
        snapshot: Snapshot,
        sets: Sequence[Strengths],
        active: ActiveSet | None,
        own: bool,
        pictures: int = 1,
        unedited: bool = False,
        least: float = 0.0,
        fixed_shape: bool = False,
    ) -> None:
        self.attachments, self.snapshot, self.sets, self.active = attachments, snapshot, tuple(sets), active
        self.own, self.pictures, self.unedited = own, pictures, unedited
        self.least, self.fixed_shape = least, fixed_shape
        self.spelled: Spelled = ()
        self.alive, self.ran, self.helped = True, False, False
        self.thread = threading.get_ident()

    def set_of(self, picture: int) -> Strengths:
        """Return the erased set of one picture."""
        return self.sets[picture if len(self.sets) > 1 else 0]

    def spelled_by(self, picture: int) -> frozenset[Key]:
        """Return the concepts that the prompt of one picture spells."""
        return self.spelled[picture] if picture < len(self.spelled) else frozenset()

    def names(self) -> list[str]:
        """Return what should be erased, for messages."""
        shown = self.snapshot.names.shown
        return list(dict.fromkeys(shown[key] for strengths in self.sets for key in strengths))

    def was_left(self) -> bool:
        """Return whether an interrupt left this record open in its call's own thread when the call had ended."""
        return not self.alive and self.thread == threading.get_ident()

    def note_pass(self) -> None:
        """Remember that a denoiser ran for this call."""
        self.ran = True

    def note_help(self) -> None:
        """Remember that a denoiser that helps another one ran for this call."""
        self.helped = True

    def parts(self) -> list[Call]:
        """Return the calls that a pass under this record belongs to."""
        return [self]

    def refuse_unclear(self) -> None:
        """Check that it is known which rows of a batch belong to which picture.

        Raises:
            ErasureNotInForce: If the pictures have different sets and this is not the thread of the call, which may
                have been given a part of the batch, or its rows in another order.
        """
        if len(self.sets) > 1 and self.thread != threading.get_ident():
            raise ErasureNotInForce(
                "the pictures of this call have different erased sets, so it is not known which rows of a batch in "
                "another thread belong to which picture; open mixed_calls([(call, picture), ...]) with one for each "
                "row of the batch, also for each row of guidance"
            )

    def __enter__(self) -> Call:
        now = record_of_thread()
        if dead := [call.names() for call in self.parts() if not call.alive]:
            raise ErasureNotInForce(f"calls that erase {dead} have ended; their records cannot be opened again")
        if now is not None and now.alive and now is not self and now not in self.parts():
            raise ErasureNotInForce(
                "another call's record is open in this thread, so it is not known which rows of a batch belong to "
                "which call; open mixed_calls([...]) with one row of a call per row of the batch"
            )
        self.refuse_unclear()
        _thread.before = [*getattr(_thread, "before", []), now]
        _thread.record = self
        for attachment in self.attachments:
            attachment.prepare_thread()
        return self

    def __exit__(self, *error: object) -> None:
        _thread.record = _thread.before.pop()


class _Mixed(Call):
    """Pictures of several calls in one batch."""

    def __init__(self, parts: Sequence[tuple[Call, int]]) -> None:
        calls = list(dict.fromkeys(call for call, _ in parts))
        if beyond := [(call.names(), picture) for call, picture in parts if not 0 <= picture < call.pictures]:
            raise ValueError(f"calls have fewer pictures than these rows say (concepts, picture): {beyond}")
        first = calls[0]
        if any(
            call.snapshot.stacks is not first.snapshot.stacks or call.attachments is not first.attachments
            for call in calls
        ):
            raise ErasureNotInForce(
                "calls that began before and after a change of the loaded banks cannot share a batch"
            )
        sets = [call.set_of(picture) for call, picture in parts]
        least, fixed_shape = max(call.least for call in calls), any(call.fixed_shape for call in calls)
        spelled = [call.spelled_by(picture) for call, picture in parts]
        active = first.snapshot.active(sets, len(sets), fixed_shape, least, spelled)
        active = None if active is None else ActiveSet(active.doors, active.module, len(sets))
        super().__init__(first.attachments, first.snapshot, sets, active, True, len(sets))
        self._calls, self._rows = calls, list(parts)

    def parts(self) -> list[Call]:
        return self._calls

    def refuse_unclear(self) -> None:
        """Accept any batch: every row was named."""

    def note_pass(self) -> None:
        if dead := [call.names() for call in self._calls if not call.alive]:
            raise ErasureNotInForce(f"calls of this batch have ended: those that erase {dead}")
        for call in self._calls:
            call.ran = True

    def note_help(self) -> None:
        for call in self._calls:
            call.helped = True

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for row, (call, picture) in enumerate(self._rows):
            if self.active is not None and call.active is not None:
                call.active.note_opened(self.active, row, picture, call.set_of(picture))


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
    """Return a record for a batch of which each row is named; `with` it, a worker runs the pass.

    For a micro-batcher that puts pictures of several calls into one batch, and for a worker that is given a part of
    the batch of a call whose pictures have different sets.

    Args:
        rows: For each row of the batch its call, and which picture of the call it is. With guidance a picture has two
            rows in a batch, and both are named.

    Raises:
        ErasureNotInForce: If the calls began with different banks. `with` raises it if a call has ended, and a pass
            if the batch has another number of rows.
        ValueError: If there are no rows, or a call has no such picture.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, current_call, mixed_calls, pocket
        >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
        >>> pipe.load_sepme(pocket.bank("styles"))
        >>> def note(pipe, step, timestep, tensors):
        ...     call = current_call()
        ...     with mixed_calls([(call, 0), (call, 1), (call, 0), (call, 1)]):  # guidance
        ...         pass  # the worker's pass
        ...     return tensors
        >>> sets = [["neon"], []]
        >>> _ = pipe(["a cat", "a dog"], erased=sets, num_inference_steps=1, callback_on_step_end=note)
    """
    if not rows:
        raise ValueError("a batch has at least one row")
    return _Mixed(list(rows))


def record_of_thread() -> Call | None:
    """Return the record that is open in this thread."""
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
    """Return what acts on a pass of a ControlNet: what acts on the call that it is part of; outside a call nothing."""
    record = record_of_thread()
    if record is None or not record.alive:
        return None
    record.note_help()
    return record.active
