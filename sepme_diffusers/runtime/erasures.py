"""Erasures: what is loaded and erased on a pipeline's denoisers, and the hooks by which it acts.

The state lives on the denoisers, so pipelines that share them share what is loaded and the standing set.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.errors import PolicyError
from sepme_diffusers.doors.attachment import Attachment, ErasureNotInForce
from sepme_diffusers.doors.registry import drawing_denoisers
from sepme_diffusers.runtime.active import ActiveSet
from sepme_diffusers.runtime.call_sets import ErasedSet, Request, strengths_of
from sepme_diffusers.runtime.calls import Call, opened, record_of_thread
from sepme_diffusers.runtime.erased_sets import Strengths, with_floors
from sepme_diffusers.runtime.helpers import Helpers
from sepme_diffusers.runtime.snapshot import LoadOptions, Snapshot

_ATTRIBUTE = "_sepme_erasures"


class Erasures:
    """The banks that a pipeline's denoisers have loaded, and what of them is erased.

    All of it is one `Snapshot`, replaced by one assignment.

    Args:
        denoisers: Those that draw. Nothing is registered on them before something is loaded.
    """

    def __init__(self, denoisers: Iterable[nn.Module]) -> None:
        self.snapshot = Snapshot()
        # What acts on passes outside any call, where that is allowed.
        self.standing: ActiveSet | None = None
        self.attachments = tuple(Attachment(denoiser, self.acting) for denoiser in denoisers)
        self.requests: WeakSet[Request] = WeakSet()
        # The factors, banks and samples of weights that were found to fit each other, see `checks`.
        self.checked_weights: Any = None
        self.lock = threading.RLock()
        self.helpers = Helpers()
        self._running: WeakSet[Call] = WeakSet()
        self._own_running = False
        for attachment in self.attachments:
            setattr(attachment.denoiser, _ATTRIBUTE, self)

    # --- what is loaded

    def refuse_taken(self, name: str) -> None:
        """Check that no bank is loaded under a name.

        Raises:
            ValueError: If one is.
        """
        if name in self.snapshot.banks:
            raise ValueError(
                f"a bank named {name!r} is loaded already; load this one under another name=, replace_bank({name!r}, "
                f"bank), or unload_sepme({name!r}) first"
            )

    def load(self, name: str, bank: ConceptBank, options: LoadOptions) -> None:
        """Make a bank's concepts erasable under a name; all or nothing.

        Raises:
            ValueError: If the name is taken, or one spelling would stand for two concepts.
        """
        with self.lock:
            self.refuse_taken(name)
            snapshot = self.snapshot
            banks, all_options = {**snapshot.banks, name: bank}, {**snapshot.options, name: options}
            self.publish(Snapshot.of(banks, all_options, snapshot.standing))

    def replace(self, name: str, bank: ConceptBank, erased: ErasedSet | None) -> None:
        """Put another bank in the place of a loaded one; all or nothing.

        Args:
            name: Of the loaded bank.
            bank: The other bank.
            erased: The standing set from then on. Default: the present one.

        Raises:
            ValueError: If the standing set, or the copy of a request, erases a concept that the new bank lacks.
        """
        with self.lock:
            snapshot = self.snapshot
            draft = Snapshot.of({**snapshot.banks, name: bank}, snapshot.options, {})
            standing = snapshot.standing if erased is None else strengths_of(erased, draft)
            asked = [("the standing set", standing)]
            for request in self.requests:
                asked.append(("a request's default", request.default or {}))
                asked.append(("what a request always erases", request.always))
            for what, strengths in asked:
                if lost := sorted(concept for owner, concept in strengths if owner == name and concept not in bank):
                    raise ValueError(
                        f"{what} erases {lost} of bank {name!r}, which the new bank lacks; it has {list(bank)[:20]}. "
                        "Give erased= with what is to be erased from then on"
                    )
            self.publish(draft.erasing(draft.ordered(standing)))

    def unload(self, names: Iterable[str]) -> None:
        """Take banks away; what else is erased stays as it was.

        Raises:
            PolicyError: If the policy of one of them always erases something.
        """
        with self.lock:
            snapshot, names = self.snapshot, set(names)
            if always := [
                concept for name in names & snapshot.banks.keys() for concept in snapshot.banks[name].always
            ]:
                raise PolicyError(
                    f"the bank's policy always erases {always}; it cannot be unloaded. replace_bank() puts a bank "
                    "with another policy in its place"
                )
            banks = {name: bank for name, bank in snapshot.banks.items() if name not in names}
            options = {name: option for name, option in snapshot.options.items() if name not in names}
            standing = {key: strength for key, strength in snapshot.standing.items() if key[0] not in names}
            self.publish(Snapshot.of(banks, options, standing))

    def erase_exactly(self, chosen: Callable[[Snapshot], Strengths]) -> None:
        """Make what is chosen, of what is loaded, the standing set."""
        with self.lock:
            snapshot = self.snapshot
            self.publish(snapshot.erasing(snapshot.ordered(chosen(snapshot))))

    def publish(self, snapshot: Snapshot) -> None:
        """Put another snapshot in the place of the present one.

        Hooks are registered before anything needs them, and removed when no call does any more: a call that is running
        goes on with the snapshot that it began with.

        Raises:
            BankError: If numbers of what is erased are not what the manifest says.
        """
        with self.lock:
            erased, standing = with_floors(snapshot.standing, snapshot.floors), None
            if snapshot.banks and snapshot.plain_pipelines:
                standing = snapshot.active([erased], fixed_shape=True)
            elif erased:
                snapshot.active([erased])  # reads the numbers: where they are damaged, nothing changes
            self.copy_to_devices(standing)
            self._tidy()  # what an interrupt left
            try:
                for attachment in self.attachments if snapshot.banks else ():
                    attachment.attach(linears=snapshot.has_per_module)
                if snapshot.stacks is not self.snapshot.stacks:
                    self.checked_weights = None  # it would hold the factors of banks that are gone
                self.standing, self.snapshot = standing, snapshot
            finally:
                self._tidy()

    def copy_to_devices(self, active: ActiveSet | None) -> None:
        """Copy what acts to the devices of the denoisers, so that no pass has to; a compiled graph would notice."""
        if active is None:
            return
        for device in {next(attachment.denoiser.parameters()).device for attachment in self.attachments}:
            if device.type != "meta":
                active.copy_to(device)

    def _tidy(self) -> None:
        """Remove the hooks once nothing is loaded and no call runs."""
        if self.snapshot.banks or any(call.alive for call in self._running):
            return
        for attachment in self.attachments:
            attachment.detach()
        self.helpers.leave()

    # --- what acts

    def acting(self) -> ActiveSet | None:
        """Return what acts on the pass that begins in this thread.

        Raises:
            ErasureNotInForce: If the pass belongs to no call that is known, and something is loaded.
        """
        record = record_of_thread()
        # torch.compile does not trace whether two tuples are one.
        if record is None or record.attachments[0] is not self.attachments[0] or record.was_left():
            return self._outside()
        if not record.alive:
            raise ErasureNotInForce(
                f"a denoiser ran for a call that has ended, which should have erased {record.names()}"
            )
        record.note_pass()
        if not torch.compiler.is_compiling() and any(record.sets):
            self._refuse_later_hooks()
        return record.active

    def _outside(self) -> ActiveSet | None:
        """What acts on a pass outside any call of an attached pipeline."""
        if not self.snapshot.banks:
            return None
        if self._own_running and self._some_own_runs():
            raise ErasureNotInForce(
                "a denoiser ran outside any call while a call with an erased set of its own is running. In a thread "
                "that works for a call, open its record first: call = current_call() there, `with call:` here"
            )
        if not self.snapshot.plain_pipelines or self.snapshot.strict:
            raise ErasureNotInForce(
                "a denoiser with a loaded bank ran outside any call of a pipeline that knows of it. Use "
                "sepme_diffusers.attach(pipe), or load the bank with load_sepme(..., plain_pipelines='standing') to "
                "let such passes run under the standing set"
            )
        if not torch.compiler.is_compiling() and (self.snapshot.standing or self.snapshot.floors):
            self._refuse_later_hooks()
        return self.standing

    def _refuse_later_hooks(self) -> None:
        for attachment in self.attachments:
            if attachment.comes_before_others():
                raise ErasureNotInForce(
                    f"another hook on {type(attachment.denoiser).__name__} comes after the edit and could undo it; "
                    "the next call of an attached pipeline, or check_erased(), puts the edit last again"
                )

    def begin(self, call: Call) -> None:
        """Count a call as running."""
        with self.lock:
            self._running.add(call)
            self._own_running = self._some_own_runs()

    def _some_own_runs(self) -> bool:
        """Whether a call with a set of its own is running; asked anew where an interrupt may have left the answer."""
        with self.lock:
            return any(call.alive and call.own for call in self._running)

    def end(self, call: Call) -> None:
        """Count a call as ended; hooks that nothing needs any more go."""
        with self.lock:
            call.alive = False
            if call.active is not None:
                call.active.forget()
            self._running.discard(call)
            self._own_running = self._some_own_runs()
            for attachment in self.attachments:
                attachment.forget_pass()
            self._tidy()

    # --- whether it acts

    def check(self, denoisers: Iterable[nn.Module]) -> None:
        """See that what is loaded acts on these denoisers as they are now.

        Raises:
            ErasureNotInForce: If hooks are gone, or the denoisers are others.
        """
        if others := [type(module).__name__ for module in denoisers if erasures_of(module) is not self]:
            raise ErasureNotInForce(f"the pipeline's {', '.join(others)} has been replaced; load the banks again")
        for attachment in self.attachments:
            if fault := attachment.fault():
                raise ErasureNotInForce(f"{fault}; unload_sepme() and load the bank again")

    def renew(self) -> None:
        """Take account of what was done to the denoisers since, see `Attachment.renew`."""
        for attachment in self.attachments:
            attachment.renew()

    def tensors(self) -> list[Tensor]:
        """Return every tensor that is held beside the banks' own."""
        return self.snapshot.stacks.tensors()

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled with the denoisers; what runs at the moment stays behind."""
        return {
            **self.__dict__,
            "lock": None,
            "requests": None,
            "checked_weights": None,
            "_running": None,
            "_own_running": False,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()
        self.requests, self._running = WeakSet(), WeakSet()


def erasures_of(denoiser: nn.Module) -> Erasures | None:
    """Return what is loaded on a denoiser, or None."""
    return getattr(denoiser, _ATTRIBUTE, None)


def erasures_on(denoisers: Mapping[str, nn.Module]) -> Erasures:
    """Return what is loaded on a pipeline's denoisers that draw; made if nothing was.

    Raises:
        ErasureNotInForce: If they belong to different sets of denoisers.
    """
    loaded = [erasures for module in denoisers.values() if (erasures := erasures_of(module)) is not None]
    known = {id(erasures): erasures for erasures in loaded}
    if not known:
        return Erasures(denoisers.values())
    erasures = next(iter(known.values()))
    if len(known) > 1 or any(erasures_of(module) is None for module in denoisers.values()):
        raise ErasureNotInForce(
            f"the denoisers {list(denoisers)} were loaded with banks apart from each other; unload_sepme() where they "
            "were loaded, and load the banks on this pipeline"
        )
    return erasures


@contextmanager
def unedited(pipe: Any) -> Iterator[None]:
    """While the block runs, this thread's passes of a pipeline's denoisers are those of the original model.

    For what makes or measures increments: whatever is loaded, always erased or set meanwhile, nothing acts.

    Args:
        pipe: The pipeline.
    """
    erasures = erasures_on(drawing_denoisers(pipe))
    call = Call(erasures.attachments, Snapshot(), [{}], None, own=True, unedited=True)
    try:
        erasures.begin(call)
        with opened(call):
            yield
    finally:
        erasures.end(call)
