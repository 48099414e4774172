"""PipelineState: what one pipeline object remembers of its erasures. What is loaded lives on its denoisers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.runtime.call_sets import Request
from sepme_diffusers.runtime.calls import Call
from sepme_diffusers.runtime.erasures import Erasures, erasures_of, erasures_on
from sepme_diffusers.runtime.receipt import Receipt
from sepme_diffusers.runtime.snapshot import Snapshot
from sepme_diffusers.runtime.text_check import TextCheck


@dataclass(eq=False)
class PipelineState:
    """What one pipeline object remembers.

    Args:
        erasures: Of the denoisers that it last used, to notice that one was swapped for another.
        banks: The names that were loaded then, to notice that another pipeline has unloaded one.
        request: What applies to its calls.
        text_check: What guards read on its text encoders, and the factors for which that was measured.
        running: The call that it runs.
        last_call: The receipt of the last call that ended well.
        is_copy: Whether the pipeline is the light copy for a request. It goes by what its pipeline loads and unloads.
    """

    erasures: Erasures | None = None
    banks: frozenset[str] = frozenset()
    request: Request = field(default_factory=Request)
    text_check: TextCheck | None = None
    running: weakref.ref[Call] | None = None
    last_call: Receipt | None = None
    is_copy: bool = False

    def for_request(self, request: Request) -> PipelineState:
        """Return the state of a light copy of the pipeline."""
        return replace(self, request=request, running=None, last_call=None, is_copy=True)

    def find(self, denoisers: Mapping[str, nn.Module]) -> Erasures:
        """Return what is loaded on the pipeline's denoisers, refusing to go on if some of it was lost.

        Args:
            denoisers: Those that draw, by the names of their components.

        Raises:
            ErasureNotInForce: If a denoiser was swapped for one without the banks, or a bank was unloaded elsewhere.
        """
        used = self.erasures
        if used is not None and used.snapshot.banks and any(erasures_of(m) is not used for m in denoisers.values()):
            raise ErasureNotInForce(
                f"this pipeline had loaded {list(used.snapshot.banks)}, but its {_kinds(denoisers)} has been replaced "
                f"({', '.join(denoisers)}); call unload_sepme() and load the banks again"
            )
        erasures = erasures_on(denoisers)
        if not self.is_copy and (lost := sorted(self.banks - erasures.snapshot.banks.keys())):
            raise ErasureNotInForce(
                f"this pipeline had loaded {lost}, which a pipeline that shares its denoiser has unloaded; call "
                "unload_sepme() and load the banks again"
            )
        self.erasures = erasures
        return erasures

    def remember(self, erasures: Erasures) -> None:
        """Remember what is loaded now."""
        self.erasures, self.banks = erasures, frozenset(erasures.snapshot.banks)

    def text_check_for(self, snapshot: Snapshot) -> TextCheck:
        """Return the check of the text encoders against what is loaded."""
        if self.text_check is None or self.text_check.banks is not snapshot.banks:
            self.text_check = TextCheck(snapshot.banks)
        return self.text_check

    def claim(self, call: Call, erasures: Erasures) -> None:
        """Make this call the one that the pipeline object runs.

        Raises:
            RuntimeError: If it runs one already, in another thread or in a callback.
        """
        with erasures.lock:
            running = self.running() if self.running is not None else None
            if running is not None and running.alive and call.snapshot.banks:
                raise RuntimeError(
                    "this pipeline object is already running a call, in another thread or in a callback; schedulers "
                    "and tokenizers cannot be shared by calls. Use pipe.for_request(), a light copy, for each"
                )
            self.running = weakref.ref(call)
            erasures.begin(call)

    def release(self, call: Call, erasures: Erasures) -> None:
        """Let the pipeline object run another call. A call that was refused leaves the running one as it is."""
        with erasures.lock:
            erasures.end(call)
            if self.running is not None and self.running() is call:
                self.running = None

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled with the pipeline; what it runs and has run stays behind."""
        return {**self.__dict__, "text_check": None, "running": None, "last_call": None}


def _kinds(denoisers: Mapping[str, nn.Module]) -> str:
    return ", ".join("UNet" if "UNet" in type(m).__name__ else type(m).__name__ for m in denoisers.values())
