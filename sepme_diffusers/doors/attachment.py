"""One contract by which edits act on a denoiser: attach, watch, detach.

    e ← edit(e) at each door;    y ← y + change(e) behind each Linear that reads the text alone

torch's own hooks, not diffusers' `ModelHook`s nor PEFT adapters: offloading, other LoRAs and attention processors
leave them in place. Afterwards the denoiser is in the state that it was in before.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sepme_diffusers.doors.arguments import DoorArguments
from sepme_diffusers.doors.family import Family
from sepme_diffusers.doors.linears import linear_of
from sepme_diffusers.doors.registry import family_of

_READING = "_sepme_reading"
_Handles = dict[str, tuple[nn.Module, RemovableHandle]]


class ErasureNotInForce(RuntimeError):
    """An erasure that was asked for cannot be shown to be in force; no picture was returned.

    Args:
        cause: Why not.
        concepts: What should be erased, by name, as far as that is known.
    """

    def __init__(self, cause: str, concepts: Iterable[str] = ()) -> None:
        self.concepts = tuple(sorted(concepts))
        super().__init__(f"{list(self.concepts)} should be erased, but {cause}" if self.concepts else cause)


class Edit(Protocol):
    """What acts on one pass of a denoiser."""

    @property
    def at_linears(self) -> bool:
        """Whether `change` acts."""
        ...

    def edit(self, embeddings: Mapping[str, Tensor], pictures: int) -> tuple[dict[str, Tensor], Any]:
        """Return the embeddings that change, by door, and what `change` needs; the sample has `pictures` rows."""
        ...

    def change(self, name: str, reading: Any) -> Tensor:
        """Return what is added to the output of the Linear of this name."""
        ...


class _Seen:
    """Which Linears a pass has run: an attribute for each, which a compiled graph can set without reading any."""


class Attachment:
    """Hooks on one denoiser that ask, at each pass, which edit acts.

    Args:
        denoiser: The denoiser itself, not what wraps it.
        acting: Called at the beginning of each pass: the edit, or None to leave the pass as it is. May raise.

    Raises:
        TypeError: If the denoiser's family is not known, or its forward lacks an argument that the family declares.
    """

    def __init__(self, denoiser: nn.Module, acting: Callable[[], Edit | None]) -> None:
        family = family_of(denoiser)
        if family is None:
            raise TypeError(f"{type(denoiser).__name__} is of no family that is known")
        self.denoiser, self.family, self.acting = denoiser, family, acting
        self.arguments = DoorArguments(denoiser, family)
        self.at = threading.local()
        self._handles: _Handles = {}
        self._linears: _Handles = {}

    def attach(self, linears: bool = False) -> None:
        """Register the hooks that are missing; all of them, or none if that is interrupted.

        Args:
            linears: Those behind the family's text Linears as well.

        Raises:
            ValueError: If `linears`, and the family names none, or the denoiser has none.
        """
        denoiser, entry = self.denoiser, self.denoiser.get_submodule(self.family.entry)
        wanted = text_linears(denoiser, self.family) if linears and not self._linears else {}
        if self._handles and not wanted:
            return
        handles: _Handles = {}
        behind_linears: _Handles = {}
        try:
            if not self._handles:
                handles["doors"] = denoiser, denoiser.register_forward_pre_hook(_Doors(self), with_kwargs=True)
                handles["end"] = denoiser, denoiser.register_forward_hook(_End(self))
                handles["reset"] = denoiser, denoiser.register_forward_hook(_Reset(self), always_call=True)
                handles["entry"] = entry, entry.register_forward_pre_hook(_Entry(self))
            for index, (name, module) in enumerate(wanted.items()):
                hook = _Linear(self, name, f"linear{index}")
                behind_linears[name] = linear_of(module), linear_of(module).register_forward_hook(hook)
            forget_graphs()
            self._handles, self._linears = self._handles or handles, self._linears or behind_linears
        except BaseException:
            _remove([*handles.values(), *behind_linears.values()])
            raise

    def detach(self) -> None:
        """Take every hook away: the denoiser is as it was before, bit for bit. Interrupted, it can be called again."""
        handles = [*self._handles.values(), *self._linears.values()]
        _remove(handles)
        if handles:
            forget_graphs()
        self._handles, self._linears = {}, {}

    def prepare_thread(self) -> None:
        """Set what this thread knows of its pass, so that a compiled graph finds every attribute from the start."""
        if not hasattr(self.at, "edit"):
            self.at.through_doors, self.at.reading, self.at.edit, self.at.seen = False, None, None, None

    def forget_pass(self) -> None:
        """Forget that a pass of this thread came through the doors: torch runs no hook after an interrupt."""
        self.at.through_doors = False

    def renew(self) -> None:
        """Take account of what was done to the denoiser: of other hooks on it, and of an entry that was replaced.

        The doors are edited after everything that other hooks do to the arguments.
        """
        self.prepare_thread()
        if not self._handles:
            return
        hooks, own = self.denoiser._forward_pre_hooks, self._handles["doors"][1].id
        if own in hooks and next(reversed(hooks)) != own:
            cast("OrderedDict[int, Any]", hooks).move_to_end(own)  # torch declares a dict
        entry = self.denoiser.get_submodule(self.family.entry)
        if entry is not self._handles["entry"][0]:  # quantised, say
            self._handles["entry"][1].remove()
            self._handles["entry"] = entry, entry.register_forward_pre_hook(_Entry(self))

    def fault(self) -> str:
        """Return why edits would not act on the denoiser as it is now; empty if they would."""
        if not self._handles:
            return f"the hooks on {type(self.denoiser).__name__} were removed"
        for module, handle in (*self._handles.values(), *self._linears.values()):
            hook = module._forward_pre_hooks.get(handle.id) or module._forward_hooks.get(handle.id)
            if getattr(hook, "attachment", None) is not self:
                return f"the hooks on {type(module).__name__} of {type(self.denoiser).__name__} were removed"
        if self.comes_before_others():
            return f"another hook on {type(self.denoiser).__name__} comes after the edit and could undo it"
        if self.denoiser.get_submodule(self.family.entry) is not self._handles["entry"][0]:
            return f"{self.family.entry} of the denoiser was replaced"
        if not self._linears:
            return ""
        now = {name: linear_of(module) for name, module in text_linears(self.denoiser, self.family).items()}
        if lost := [name for name, (linear, _) in self._linears.items() if now.get(name) is not linear]:
            return f"{lost} no longer pass through the increments: they were replaced"
        return ""

    def comes_before_others(self) -> bool:
        """Return whether a hook on the denoiser comes after the one that edits the doors."""
        own = self._handles.get("doors")
        return own is not None and next(reversed(self.denoiser._forward_pre_hooks), own[1].id) != own[1].id

    @property
    def slots(self) -> dict[str, str]:
        """Where a pass notes that a Linear ran, by the Linear's name."""
        return {name: f"linear{index}" for index, name in enumerate(self._linears)}

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled with the denoiser; what threads do at the moment stays behind."""
        return {**self.__dict__, "at": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.at = threading.local()


def _remove(handles: list[tuple[nn.Module, RemovableHandle]]) -> None:
    """Take hooks away, those last on which the others depend: a pass may begin in between."""
    for _, handle in reversed(handles):
        handle.remove()


def text_linears(denoiser: nn.Module, family: Family) -> Mapping[str, nn.Module]:
    """Return the Linears that read the text and nothing else, by module name.

    Raises:
        ValueError: If the family names none, or the denoiser has none.
    """
    if family.linears is None:
        raise ValueError(
            f"family {family.name!r} ({type(denoiser).__name__}) names no Linears that read the text alone, so "
            "per-module increments cannot act on it; text-side increments (solver='closed_form') can"
        )
    return family.linears(denoiser)


class _Hook:
    """A hook that knows whose it is; an object, not a closure, so that it is copied together with its module."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self.attachment.denoiser) not in memo:  # a part alone is copied, as PEFT does: it is no denoiser's
            return _no_hook
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def _no_hook(*_: Any) -> None:
    """Nothing."""


class _Doors(_Hook):
    """Edits the text arguments at the beginning of a pass."""

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attachment, at = self.attachment, self.attachment.at
        at.through_doors = False
        edit = attachment.acting()
        at.edit, at.reading = edit, None
        if edit is None:
            at.through_doors = True
            return None
        embeddings = attachment.arguments.embeddings(args, kwargs)
        if not embeddings:
            doors = [door.argument for door in attachment.family.doors]
            raise ErasureNotInForce(f"a pass of {type(denoiser).__name__} brought no text by any of {doors}")
        edited, at.reading = edit.edit(embeddings, attachment.arguments.pictures(args, kwargs))
        if edit.at_linears:
            at.seen = _Seen()
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                edited = _carrying(embeddings | edited, at.reading)
        at.through_doors = True
        return attachment.arguments.replaced(args, kwargs, edited)


class _Reset(_Hook):
    """Forgets, also after a pass that failed, that the pass came through the doors."""

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.attachment.at.through_doors = False


def _carrying(embeddings: dict[str, Tensor], reading: Any) -> dict[str, Tensor]:
    """Embeddings that carry the reading: gradient checkpointing runs Linears again, perhaps in a later pass."""
    aliases = {door: embedding.view_as(embedding) for door, embedding in embeddings.items()}
    for alias in aliases.values():
        setattr(alias, _READING, reading)
    return aliases


class _Entry(_Hook):
    """Refuses a pass that went round the doors, by calling `forward` itself."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        at = self.attachment.at
        # A pass may have begun before there were hooks; where nothing acts, it may go on.
        if not getattr(at, "through_doors", False) and self.attachment.acting() is not None:
            raise ErasureNotInForce(
                f"{type(self.attachment.denoiser).__name__}.forward was called directly, which skips the edit of the "
                "text; call the module itself"
            )
        at.through_doors = False


class _Linear(_Hook):
    """Adds a per-module change to what a Linear gives."""

    def __init__(self, attachment: Attachment, name: str, slot: str) -> None:
        super().__init__(attachment)
        self.name, self.slot = name, slot

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        at = self.attachment.at
        edit = getattr(at, "edit", None)
        if edit is None or not edit.at_linears:
            return None
        setattr(at.seen, self.slot, True)
        reading = at.reading
        if inputs and not torch.compiler.is_compiling():
            reading = getattr(inputs[0], _READING, reading)
        return output + edit.change(self.name, reading).to(output.dtype)


class _End(_Hook):
    """Refuses a pass in which a Linear that should have changed did not run."""

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        attachment, at = self.attachment, self.attachment.at
        if at.edit is None or not at.edit.at_linears:
            return
        missing = [name for name, slot in attachment.slots.items() if not hasattr(at.seen, slot)]
        if missing:
            raise ErasureNotInForce(
                f"{missing} were bypassed by the attention processors. Set processors that call to_k and to_v "
                "(unet.set_default_attn_processor(), unfuse_qkv_projections()); text-side increments "
                "(solver='closed_form') do not depend on them"
            )


def forget_graphs() -> None:
    """Drop what torch.compile has traced: by default its graphs do not notice that hooks came or went."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["stats"]["unique_graphs"]:
        torch.compiler.reset()


@contextmanager
def attached(denoiser: nn.Module, edit: Edit) -> Iterator[Attachment]:
    """While the block runs, an edit acts on every pass of the denoiser.

    A backward pass through gradient checkpointing belongs into the block: it runs the Linears again.

    Args:
        denoiser: The denoiser itself, not what wraps it.
        edit: The edit; with `at_linears` it also acts behind the family's text Linears.
    """
    attachment = Attachment(denoiser, lambda: edit)
    try:
        attachment.attach(linears=edit.at_linears)
        yield attachment
    finally:
        attachment.detach()
