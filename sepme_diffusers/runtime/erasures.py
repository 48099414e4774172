"""Increments in force on a denoiser, through torch's own forward hooks.

    y = W_m (e + ((e A_tᵀ) ⊙ mask_t) Bᵀ)  +  ((e A_mᵀ) ⊙ mask_m) C_mᵀ

An increment with a gate drops out for a prompt that does not open it (`stack`). Text-side increments change what a
projection reads, per-module ones what it gives: both are of the unedited e, so that they add up. Hooks, not PEFT
adapters: `set_adapters`, `load_lora_weights` or `unload_lora_weights` of something unrelated must never switch an
erasure off. The state lives on the denoiser, so pipelines that share it share what is erased. The denoiser itself
refuses a pass in which an active erasure was not read by every projection.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sepme_diffusers.doors.linears import apply_linear, cross_attentions, linear_of, plain, text_projections
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.runtime.names import Key, Names
from sepme_diffusers.runtime.stack import Acting, Placed, Stack

if TYPE_CHECKING:
    from sepme_diffusers.bank.bank import ConceptBank

_ATTRIBUTE = "_sepme_erasures"
# What an edited embedding remembers of the one it was made from.
_UNEDITED = "_sepme_unedited"
# Processors that read weights of their own instead of calling to_k and to_v.
_BYPASSING = ("Fused", "CustomDiffusion")
# Another checkpoint moves a projection's output by about 1.4 of itself; a fused LoRA or a cast by little.
_OTHER_WEIGHTS = 0.5


class ErasureNotInForce(RuntimeError):
    """An erasure that was asked for cannot be shown to be in force; nothing was generated."""


class Erasures:
    """The banks that a denoiser has loaded, and which of their increments are active.

    Args:
        denoiser: The UNet; hooks are registered on it and on its text projections at once.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        denoiser = plain(denoiser)
        self.banks: dict[str, ConceptBank] = {}
        self.names = Names({})
        self.compiled = False
        self._increments: dict[Key, Increment] = {}
        self._strengths: dict[Key, float] = {}
        self._stacks: dict[str, tuple[Any, Stack]] = {}
        self._standing: dict[str, Acting] = {}
        self._local = threading.local()
        self._attentions = list(cross_attentions(denoiser).values())
        self._verified: tuple[int, ...] | None = None
        self._behaviour = _behaviour(denoiser)
        self._handles = [denoiser.register_forward_pre_hook(_Begin(self)), denoiser.register_forward_hook(_End(self))]
        for name, module in text_projections(denoiser).items():
            linear = linear_of(module)
            self._handles.append(linear.register_forward_pre_hook(_EditInput(self, name)))
            self._handles.append(linear.register_forward_hook(_AddChange(self, name)))
        setattr(denoiser, _ATTRIBUTE, self)
        _forget_compiled_graphs()

    @property
    def active(self) -> dict[Key, float]:
        """Strength of each active increment."""
        return dict(self._strengths)

    def load(self, name: str, bank: ConceptBank, strengths: Mapping[Key, float]) -> None:
        """Make a bank's increments available under a name, and exactly these active; all or nothing.

        The order of summation is that of the banks' names, whichever was loaded first.
        """
        self._rebuild({**self.banks, name: bank}, strengths)

    def unload(self, name: str) -> None:
        """Take one bank away; what else is active stays as it was."""
        left = {key: strength for key, strength in self._strengths.items() if key[0] != name}
        self._rebuild({other: bank for other, bank in self.banks.items() if other != name}, left)

    def _rebuild(self, banks: Mapping[str, ConceptBank], strengths: Mapping[Key, float]) -> None:
        before = self.banks, self.names, self._increments, self._stacks
        self.banks = dict(sorted(banks.items()))
        self.names = Names(self.banks)
        self._increments = {(b, c): entry.increment for b, bank in self.banks.items() for c, entry in bank.items()}
        self._stacks = {}
        try:
            self.activate(strengths)
        except BaseException:
            self.banks, self.names, self._increments, self._stacks = before
            raise

    def activate(self, strengths: Mapping[Key, float]) -> None:
        """Make exactly these increments active. One canonical order of summation: no trace of earlier calls.

        Raises:
            KeyError: If one is not loaded; nothing changes then.
        """
        self._standing = self._acting_for([strengths])
        self._strengths = {key: float(strengths[key]) for key in self._increments if key in strengths}

    @contextmanager
    def temporarily(self, rows: Sequence[Mapping[Key, float]]) -> Iterator[None]:
        """While the block runs, in this thread, row i of a batch has the increments of rows[i]; one row is for all.

        Afterwards, whatever happened, what `activate` said last is in force again; in other threads it always was.

        Raises:
            KeyError: If one is not loaded; nothing changes then.
        """
        acting, before = self._acting_for(rows), getattr(self._local, "acting", None)
        self._local.acting = acting
        try:
            yield
        finally:
            if before is None:
                del self._local.acting
            else:
                self._local.acting = before

    def _acting_for(self, rows: Sequence[Mapping[Key, float]]) -> dict[str, Acting]:
        """What acts on a batch with these rows, by form."""
        asked = {key for strengths in rows for key in strengths}
        if unknown := sorted(asked - self._increments.keys()):
            raise KeyError(f"not loaded: {unknown}; loaded: {list(self._increments)}")
        acting = {}
        for form in ("text", "module"):
            if (stack := self._stack(form, asked)) is not None:
                acting[form] = Acting(stack, Placed(stack.mask(rows)))
        return acting

    def _stack(self, form: str, asked: set[Key]) -> Stack | None:
        """The increments of one form: all of them while they are few, else those that are asked for."""
        found = {key: one for key, one in self._increments.items() if one.form == form}
        # A compiled graph must not change with the set, so the empty set has a stack too, with a mask of zeros.
        if not found or not (self.compiled or asked & found.keys()):
            return None
        d, width = next(iter(found.values())).A.shape[1], None
        if _ranks(found) > d:
            found = {key: one for key, one in found.items() if key in asked} or dict([next(iter(found.items()))])
            if self.compiled:
                width = d
                while width < _ranks(found):
                    width *= 2
        keys, known = (tuple(found), width), self._stacks.get(form)
        if known is None or known[0] != keys:
            self._stacks[form] = (keys, Stack(found, width))
        return self._stacks[form][1]

    def set_compiled(self, compiled: bool) -> None:
        """Whether the denoiser is compiled: then what acts must have the same shapes for every erased set."""
        if compiled != self.compiled:
            self.compiled = compiled
            self._stacks = {}
            self.activate(self._strengths)

    def acting(self, form: str) -> Acting | None:
        """What acts now, in this thread, of one form."""
        now = getattr(self._local, "acting", None)
        return (self._standing if now is None else now).get(form)

    def stacked(self) -> list[Tensor]:
        """Every tensor that is held beside the banks' own, on every device."""
        return [tensor for _, stack in self._stacks.values() for tensor in stack.tensors()]

    def note(self, name: str) -> None:
        """Remember that a projection read the embedding in this pass."""
        if not torch.compiler.is_compiling() and (seen := getattr(self._local, "seen", None)) is not None:
            seen.add(name)

    def once(self, embedding: Tensor, acting: Acting, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` makes of an embedding: computed once a pass, not once a projection.

        Known by the tensor itself, which is kept, and its version, so that nothing stale can be taken for it.
        """
        known = None if torch.compiler.is_compiling() else getattr(self._local, "known", None)
        if known is None:
            return compute()
        key = (id(embedding), id(acting), None if embedding.is_inference() else embedding._version)
        if key not in known:
            known[key] = (embedding, acting, compute())
        return known[key][-1]

    def begin_pass(self) -> None:
        """Watch this pass of the denoiser if the modules are not those, with those processors, of the last watched."""
        self._local.known = {}
        watch = self.acting("text") is not None or self.acting("module") is not None
        self._local.seen = set() if watch and not self.compiled and self._wiring() != self._verified else None

    def end_pass(self, denoiser: nn.Module) -> None:
        """Check a pass that was watched.

        Raises:
            ErasureNotInForce: If a projection was bypassed.
        """
        seen = getattr(self._local, "seen", None)
        self._local.seen = self._local.known = None
        if seen is None:
            return
        if missing := [name for name in text_projections(denoiser) if name not in seen]:
            raise ErasureNotInForce(
                f"{self._names()} should be erased, but {missing} were bypassed by the attention processors. Set "
                "processors that call to_k and to_v (unet.set_default_attn_processor()), or set_erased([])"
            )
        self._verified = self._wiring()

    def _names(self) -> list[str]:
        rows = [acting.stack.slices for form in ("text", "module") if (acting := self.acting(form)) is not None]
        return sorted({concept for keys in rows for _, concept in keys})

    def _wiring(self) -> tuple[int, ...]:
        return tuple(id(part) for a in self._attentions for part in (a, a.processor, a.to_k, a.to_v))

    def check(self, denoiser: nn.Module) -> None:
        """See that what is loaded would act on the denoiser as it is now; its next pass is watched as well.

        Raises:
            ErasureNotInForce: If hooks are gone, processors bypass them, or the weights are another model's.
        """
        denoiser = plain(denoiser)
        self._verified = None
        if missing := self.missing_from(denoiser):
            raise ErasureNotInForce(
                f"{missing} no longer pass through the increments. Undo what replaced them "
                "(unfuse_qkv_projections(), set_default_attn_processor()), or load the bank again after changing the "
                "UNet"
            )
        if any(one.form == "module" for one in self._increments.values()):
            self._check_weights(denoiser)

    def _check_weights(self, denoiser: nn.Module) -> None:
        now = _behaviour(denoiser)
        changed = [name for name, y in now.items() if (y - self._behaviour[name]).norm() > _OTHER_WEIGHTS * y.norm()]
        if changed:
            raise ErasureNotInForce(
                f"the UNet's weights are no longer those that the per-module increments were loaded on: {changed}. "
                "Load the bank again; text-side increments (solver='closed_form') serve other weights too"
            )

    def missing_from(self, denoiser: nn.Module) -> list[str]:
        """Text projections of the denoiser on which these erasures would not act."""
        bypassed = [
            f"{name}.{projection}"
            for name, attention in cross_attentions(denoiser).items()
            for projection in ("to_k", "to_v")
            if type(attention.processor).__name__.startswith(_BYPASSING)
        ]
        return bypassed + [name for name, module in text_projections(denoiser).items() if not self._on(module)]

    def _on(self, module: nn.Module) -> bool:
        linear = linear_of(module)
        hooks = (*linear._forward_pre_hooks.values(), *linear._forward_hooks.values())
        return sum(getattr(hook, "erasures", None) is self for hook in hooks) == 2

    def extend(self, reader: nn.Module) -> bool:
        """Let text-side increments act on another module that reads the same text (a ControlNet) as well.

        Returns:
            Whether that is everything that is loaded.
        """
        for name, module in text_projections(reader).items():
            linear = linear_of(module)
            if not any(getattr(hook, "erasures", None) is self for hook in linear._forward_pre_hooks.values()):
                self._handles.append(linear.register_forward_pre_hook(_EditInput(self, name)))
        return all(one.form == "text" for one in self._increments.values())

    def remove(self, denoiser: nn.Module) -> None:
        """Take every hook away: the denoiser is as it was before, bit for bit."""
        for handle in self._handles:
            handle.remove()
        delattr(plain(denoiser), _ATTRIBUTE)
        _forget_compiled_graphs()

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled with the denoiser; only what threads do at the moment stays behind."""
        return {**self.__dict__, "_local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()
        self._verified = None


class _Hook:
    """A hook that knows whose it is; an object, not a closure, so that it is copied together with its module."""

    def __init__(self, erasures: Erasures, name: str = "") -> None:
        self.erasures, self.name = erasures, name


class _EditInput(_Hook):
    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self.erasures.note(self.name)
        acting = self.erasures.acting("text")
        if acting is None:
            return None
        embedding = inputs[0]
        return (self.erasures.once(embedding, acting, lambda: self._edited(embedding, acting)), *inputs[1:])

    @staticmethod
    def _edited(embedding: Tensor, acting: Acting) -> Tensor:
        edited = embedding + acting.change(acting.read(embedding)).to(embedding.dtype)
        setattr(edited, _UNEDITED, embedding)
        return edited


class _AddChange(_Hook):
    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        acting = self.erasures.acting("module")
        if acting is None:
            return None
        embedding = inputs[0]
        if self.erasures.acting("text") is not None:
            embedding = getattr(embedding, _UNEDITED, None)
            if embedding is None:
                raise ErasureNotInForce(f"another hook on {self.name} has replaced the edited embedding")
        read = self.erasures.once(embedding, acting, lambda: acting.read(embedding))
        return output + acting.change(read, self.name).to(output.dtype)


class _Begin(_Hook):
    def __call__(self, denoiser: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self.erasures.begin_pass()


class _End(_Hook):
    def __call__(self, denoiser: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.erasures.end_pass(denoiser)


def erasures_of(denoiser: nn.Module) -> Erasures | None:
    """What is loaded on a denoiser, or None."""
    return getattr(plain(denoiser), _ATTRIBUTE, None)


def _ranks(increments: Mapping[Key, Increment]) -> int:
    return sum(increment.rank for increment in increments.values())


@torch.no_grad()
def _behaviour(denoiser: nn.Module) -> dict[str, Tensor]:
    """What each text projection, without hooks or adapters, makes of one fixed vector."""
    found = {}
    for name, module in text_projections(denoiser).items():
        linear = linear_of(module)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(1, linear.in_features, generator=generator)
        found[name] = apply_linear(linear, probe)
    return found


def _forget_compiled_graphs() -> None:
    """Drop what torch.compile has traced: by default its graphs do not notice that hooks came or went."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["stats"]["unique_graphs"]:
        torch.compiler.reset()
