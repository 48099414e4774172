"""Helpers: denoisers that help those that draw (ControlNets), and read the edited text with them.

They do so within calls; outside of calls they are plain. A helper may be shared by pipelines around several
denoisers; it keeps its hooks as long as one of them needs them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import nn

from sepme_diffusers.doors.attachment import Attachment, ErasureNotInForce
from sepme_diffusers.runtime.active import ActiveSet
from sepme_diffusers.runtime.calls import Call, following

_ATTRIBUTE = "_sepme_follower"
_lock = threading.Lock()


class Helpers:
    """The helpers that follow what acts on some denoisers."""

    def __init__(self) -> None:
        self._modules: WeakSet[nn.Module] = WeakSet()

    def follow(self, modules: Iterable[nn.Module]) -> None:
        """Let helpers read the edited text within calls.

        Args:
            modules: The helpers.
        """
        with _lock:
            for module in modules:
                follower = _follower_of(module)
                if follower is None:
                    follower = _Follower(module)
                    setattr(module, _ATTRIBUTE, follower)
                self._modules.add(module)
                follower.users.add(self)
                follower.attachment.attach()
                follower.attachment.renew()

    def leave(self) -> None:
        """Take the hooks off the helpers that nothing else that is loaded needs."""
        with _lock:
            for module in list(self._modules):
                follower = _follower_of(module)
                if follower is not None:
                    follower.users.discard(self)
                    if not follower.users:
                        follower.attachment.detach()
            self._modules.clear()

    def __reduce__(self) -> tuple[type[Helpers], tuple[()]]:
        """Copied and pickled empty: a copy has followed nothing yet."""
        return type(self), ()


def check_helpers(call: Call, modules: Iterable[nn.Module]) -> None:
    """Check, after the last step of a call, that what helped it read the edited text.

    Raises:
        ErasureNotInForce: If no helper ran for the call, or one does not follow what acts.
    """
    for module in modules:
        follower = _follower_of(module)
        if follower is None:
            raise ErasureNotInForce(f"the pipeline's {type(module).__name__} was replaced in the middle of the call")
        if fault := follower.attachment.fault():
            raise ErasureNotInForce(fault)
        if not call.helped:
            raise ErasureNotInForce(
                f"no pass of {type(module).__name__} was seen in this call: a thread that runs it for a call must "
                "open its record: call = current_call(), `with call:` there"
            )


class _Follower:
    """Asks what acts on a helper's pass; an object, so that it is copied and pickled with the helper."""

    def __init__(self, module: nn.Module) -> None:
        self.attachment = Attachment(module, self)
        self.users: WeakSet[Helpers] = WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "users": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.users = WeakSet()

    def __call__(self) -> ActiveSet | None:
        active = following()
        return None if active is None else active.at_doors


def _follower_of(module: nn.Module) -> _Follower | None:
    """What follows for a helper; None if nothing does, or what does is that of the module of which this is a copy."""
    follower = getattr(module, _ATTRIBUTE, None)
    return follower if follower is not None and follower.attachment.denoiser is module else None
