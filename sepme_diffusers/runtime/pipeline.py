"""Pipelines that load concept banks and erase any subset of them."""

from __future__ import annotations

import copy
import difflib
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging
from torch import nn

from sepme_diffusers.algebra.rounding import rounding_share
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import refuse_other_text, refuse_other_weights
from sepme_diffusers.bank.errors import PolicyError
from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.doors.linears import is_compiled, other_text_readers, projection_weights
from sepme_diffusers.doors.registry import denoisers_of, drawing_denoisers, is_helper
from sepme_diffusers.runtime.calls import Call, opened, record_of_thread
from sepme_diffusers.runtime.erased_sets import Key, Strengths, UnknownConceptError
from sepme_diffusers.runtime.erasures import (
    Erasures,
    Request,
    erasures_of,
    erasures_on,
    follow,
    see_that_helpers_acted,
)
from sepme_diffusers.runtime.host_rules import Inversions, refuse_callers_embeddings, refuse_image_prompts
from sepme_diffusers.runtime.receipt import Receipt
from sepme_diffusers.runtime.snapshot import LoadOptions, Snapshot, with_floors
from sepme_diffusers.runtime.text_check import TextCheck, encode_settings, text_encoders

logger = logging.get_logger(__name__)

ErasedSet = Iterable[str] | Mapping[str, float]

# Deprecated arguments that diffusers' pipelines still take out of their **kwargs.
_DEPRECATED = {"callback", "callback_steps"}
_IMAGES = ("num_images_per_prompt", "num_videos_per_prompt")
# Pipelines that show rows of one prompt to the denoiser beside rows of another, in an order of their own.
_MIXING_ROWS = ("Panorama", "TextToVideoZero")


class SepMELoaderMixin:
    """`load_sepme`, `set_erased`, `erase`, `restore`, `unload_sepme` for a pipeline whose denoiser reads text.

    What is loaded and erased lives on the denoiser: pipelines that share it (`from_pipe`) share it too.
    """

    # What this pipeline last used, to notice a denoiser that was swapped for one without it.
    _sepme_used: Erasures | None = None
    _sepme_banks: frozenset[str] = frozenset()
    _sepme_request: Request | None = None
    _sepme_check: TextCheck | None = None
    _sepme_running: weakref.ref[Call] | None = None
    _sepme_last: Receipt | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain = next(
            (kind for kind in cls.__mro__ if not issubclass(kind, SepMELoaderMixin) and "__call__" in vars(kind)), None
        )
        if plain is not None and "__call__" not in vars(cls):
            cls.__call__ = _erasing_call(plain.__call__)

    # --- loading

    def load_sepme(
        self,
        pretrained_model_name_or_path_or_bank: str | Path | ConceptBank,
        name: str | None = None,
        concepts: Iterable[str] | None = None,
        *,
        strict: bool = False,
        allow_embeddings: bool = False,
        allow_images: bool = False,
        plain_pipelines: Literal["refuse", "standing"] = "refuse",
        **hub: Any,
    ) -> None:
        """Make a bank's concepts erasable. Erases nothing, unless the bank's policy says so.

        Several banks can be loaded; what the others erase stays as it is. From then on a pass of the denoiser outside
        a call of a pipeline that knows of the bank raises: `attach` other pipelines that share the denoiser.

        Args:
            pretrained_model_name_or_path_or_bank: A Hub repository id, a folder, or a ConceptBank.
            name: What to call the bank where two of them share a concept ("name/concept"). Default: the last part of
                the repository id or folder; "bank" for a ConceptBank.
            concepts: Load (and download) these alone. Default: all.
            strict: For hosts. A call must say what it erases (`erased=[]` is allowed), and while something is erased
                embeddings from the caller (`prompt_embeds`, textual inversions) and image prompts are refused.
            allow_embeddings: Allow the embeddings all the same.
            allow_images: Allow the image prompts all the same.
            plain_pipelines: "standing" lets plain pipelines that share the denoiser draw under the standing set. They
                have no `erased=`: diffusers' pipelines ignore an argument of that name, or refuse it.
            hub: `cache_dir`, `force_download`, `local_files_only`, `token`, `revision`, `subfolder`, see
                `ConceptBank.from_pretrained`.

        Raises:
            BankError: If the bank cannot be trusted or understood.
            ValueError: If it was made for another base, or its name is taken. Nothing changes then.
            KeyError: If the bank lacks one of `concepts`.
        """
        if plain_pipelines not in ("refuse", "standing"):
            raise ValueError(f"plain_pipelines is 'refuse' or 'standing', not {plain_pipelines!r}")
        bank = _bank_of(pretrained_model_name_or_path_or_bank, concepts, hub)
        name = name or _name_of(pretrained_model_name_or_path_or_bank)
        erasures = self._erasures()
        if name in erasures.snapshot.banks:
            raise ValueError(
                f"a bank named {name!r} is loaded already; load this one under another name=, replace_bank({name!r}, "
                f"bank), or unload_sepme({name!r}) first"
            )
        self._refuse_other_base(bank)
        vocabularies = Inversions.of(self) if strict else None
        options = LoadOptions(strict, allow_embeddings, allow_images, plain_pipelines == "standing", vocabularies)
        with erasures.lock:
            erasures.load(name, bank, options, erasures.snapshot.standing)
        self._sepme_banks = frozenset(erasures.snapshot.banks)
        logger.info("loaded %d erasable concepts as %r", len(bank), name)

    def replace_bank(
        self,
        name: str,
        bank: str | Path | ConceptBank,
        erased: ErasedSet | None = None,
        concepts: Iterable[str] | None = None,
        **hub: Any,
    ) -> None:
        """Put another bank in the place of a loaded one, in one step; this is also how a policy's erasure is lifted.

        Calls that are running go on with the bank that they began with.

        Args:
            name: Of the loaded bank.
            bank: A Hub repository id, a folder, or a ConceptBank.
            erased: The standing set from then on. Default: the present one.
            concepts: Load these alone. Default: all.
            hub: See `load_sepme`.

        Raises:
            BankError: If the new bank cannot be trusted or understood.
            ValueError: If no bank has that name, the new one was made for another base, or it lacks a concept that the
                standing set, or the copy of a request, erases. Nothing changes then.
        """
        erasures = self._erasures()
        snapshot = erasures.snapshot
        self._known_bank(name, snapshot)
        new = _bank_of(bank, concepts, hub)
        self._refuse_other_base(new)
        with erasures.lock:
            snapshot = erasures.snapshot
            draft = Snapshot.of({**snapshot.banks, name: new}, snapshot.options, {})
            standing = snapshot.standing if erased is None else draft.names.strengths(erased)
            asked = {"the standing set": standing}
            for request in erasures.requests:
                asked["a request's default"] = {**asked.get("a request's default", {}), **(request.default or {})}
                asked["what a request always erases"] = {
                    **asked.get("what a request always erases", {}),
                    **request.always,
                }
            for what, strengths in asked.items():
                if lost := sorted(concept for bank_, concept in strengths if bank_ == name and concept not in new):
                    raise ValueError(
                        f"{what} erases {lost} of bank {name!r}, which the new bank lacks; it has {list(new)[:20]}. "
                        "Give erased= with what is to be erased from then on"
                    )
            erasures.publish(Snapshot.of(draft.banks, draft.options, standing))

    def unload_sepme(self, bank: str | None = None) -> None:
        """Take a bank away, by name, or all of them: the pipeline is the plain one again, bit for bit.

        Raises:
            ValueError: If no bank has that name. Nothing changes then.
            PolicyError: If its policy always erases something; `replace_bank` lifts that. Nothing changes then.
        """
        used = self._sepme_used
        erasures = next((e for m in self._main().values() if (e := erasures_of(m)) is not None), None)
        if used is not None and erasures is not used:
            erasures = None if bank is None else used
        snapshot = erasures.snapshot if erasures is not None else Snapshot()
        names = list(snapshot.banks) if bank is None else [self._known_bank(bank, snapshot)]
        if always := [concept for name in names for concept in snapshot.banks[name].always]:
            raise PolicyError(
                f"the bank's policy always erases {always}; it cannot be unloaded. replace_bank() puts a bank with "
                "another policy in its place"
            )
        # First: after an interrupt this pipeline must not miss what it took away itself.
        self._sepme_used, self._sepme_banks = erasures, frozenset(snapshot.banks) - frozenset(names)
        if erasures is not None:
            erasures.unload(names)

    def get_bank(self, name: str | None = None) -> ConceptBank | None:
        """A loaded bank: the only one, or the one of that name; None if nothing is loaded.

        Raises:
            ValueError: If no bank has that name, or several are loaded and no name is given.
        """
        snapshot = self._snapshot()
        if name is None and len(snapshot.banks) > 1:
            raise ValueError(f"several banks are loaded; say which of {list(snapshot.banks)}")
        if name is not None:
            return snapshot.banks[self._known_bank(name, snapshot)]
        return next(iter(snapshot.banks.values()), None)

    # --- the erased set

    @property
    def erasable(self) -> tuple[str, ...]:
        """The concepts that `set_erased` accepts."""
        return tuple(self._snapshot().names.shown.values())

    @property
    def erased(self) -> tuple[str, ...]:
        """The concepts that a call without `erased=` erases now."""
        snapshot = self._snapshot()
        return tuple(snapshot.names.shown[key] for key in self._default(snapshot))

    def set_erased(self, concepts: ErasedSet) -> None:
        """Erase exactly these concepts from the next call on; everything else is restored. Absolute and idempotent.

        What loaded banks always erase is added. A call that is running keeps the set that it began with.

        Args:
            concepts: Names, or {name: strength}; 1 is the strength it was made with.

        Raises:
            TypeError: If a single string is given, or a name is no string.
            UnknownConceptError: On a name that is unknown (with the nearest one) or shared by two banks.
            ValueError: If a name is given twice, or a strength is not a number from 2^-20 to 2^10. What was erased
                stays erased then.
        """
        erasures = self._erasures()
        with erasures.lock:
            snapshot = erasures.snapshot
            self._publish(erasures, snapshot, self._strengths_of(concepts, snapshot))

    def erase(self, *concepts: str) -> None:
        """Erase these concepts as well, at full strength. Raises as `set_erased` does."""
        self._change(concepts, lambda standing, keys: {**standing, **dict.fromkeys(keys, 1.0)})

    def restore(self, *concepts: str) -> None:
        """Restore these concepts, exactly; every other erasure stays as it is.

        Raises:
            UnknownConceptError: As `set_erased`.
            PolicyError: If a loaded bank, or the owner of the request, always erases one of them.
        """

        def without(standing: Strengths, keys: Sequence[Key]) -> dict[Key, float]:
            self._refuse_lifting(keys)
            return {key: strength for key, strength in standing.items() if key not in keys}

        self._change(concepts, without)

    def restore_all(self) -> None:
        """Restore every concept, exactly.

        Raises:
            PolicyError: If a loaded bank, or the owner of the request, always erases something.
        """
        self._refuse_lifting(list(self._floors(self._snapshot())))
        self.set_erased([])

    def _refuse_lifting(self, keys: Sequence[Key]) -> None:
        snapshot = self._snapshot()
        if kept := [snapshot.names.shown[key] for key in keys if key in self._floors(snapshot)]:
            raise PolicyError(
                f"a policy always erases {kept}: that of a loaded bank (replace_bank() lifts it), or what "
                "for_request(always=...) was given"
            )

    def _change(self, concepts: Sequence[str], change: Callable[[Strengths, Sequence[Key]], Strengths]) -> None:
        erasures = self._erasures()
        with erasures.lock:
            snapshot = erasures.snapshot
            if not snapshot.banks:
                raise UnknownConceptError(
                    f"{list(concepts)} cannot be erased or restored: no bank is loaded; call load_sepme() first"
                )
            self._publish(erasures, snapshot, change(snapshot.standing, snapshot.names.keys(concepts)))

    def _publish(self, erasures: Erasures, snapshot: Snapshot, standing: Strengths) -> None:
        erasures.publish(snapshot.erasing(snapshot.ordered(standing)))

    def _strengths_of(self, concepts: ErasedSet, snapshot: Snapshot) -> dict[Key, float]:
        """An erased set by key."""
        if snapshot.banks:
            return snapshot.names.strengths(concepts)
        if not isinstance(concepts, str) and not list(concepts):
            return {}
        raise UnknownConceptError(f"cannot erase {concepts!r}: no bank is loaded; call load_sepme() first")

    def _floors(self, snapshot: Snapshot) -> dict[Key, float]:
        """What every call erases."""
        return with_floors(snapshot.floors, self._asked_for_request(snapshot).always)

    def _default(self, snapshot: Snapshot) -> dict[Key, float]:
        """What a call without a set of its own erases."""
        own = self._asked_for_request(snapshot).default
        return snapshot.ordered(with_floors(snapshot.standing if own is None else own, self._floors(snapshot)))

    # --- requests

    def _asked_for_request(self, snapshot: Snapshot) -> Request:
        """What `for_request` was given.

        Raises:
            ErasureNotInForce: If a bank that it names has been unloaded since.
        """
        request = self._sepme_request or Request()
        if lost := [
            "/".join(key) for key in {**request.always, **(request.default or {})} if key not in snapshot.names.shown
        ]:
            raise ErasureNotInForce(
                f"this copy of a pipeline was made by for_request() to erase {lost}, which is no longer loaded"
            )
        return request

    def for_request(self, always: ErasedSet = (), erased: ErasedSet | None = None) -> Any:
        """Return a light copy of the pipeline for one request, tenant or thread: own scheduler, shared weights.

        Schedulers keep where they are in a picture, and fast tokenizers how they pad: threads can share neither.

        Args:
            always: Erased in every call of the copy, whatever the call says.
            erased: Erased in calls of the copy that do not say what to erase, in place of the standing set. Default:
                the standing set.

        Raises:
            UnknownConceptError: As `set_erased`.

        Example:
            >>> from sepme_diffusers import SepMEPipeline, pocket
            >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
            >>> pipe.load_sepme(pocket.bank("styles"))
            >>> pipe.for_request(always=["neon"], erased=["pencil"]).erased
            ('neon', 'pencil')
        """
        erasures = self._erasures()
        snapshot = erasures.snapshot
        floor = self._strengths_of(always, snapshot)
        mine = self._sepme_request
        request = Request(
            with_floors(floor, mine.always if mine is not None else {}),
            self._strengths_of(erased, snapshot)
            if erased is not None
            else (mine.default if mine is not None else None),
        )
        self._text_check(snapshot)  # shared by the copies, so that not each of them reads the guards anew
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        for name, part in self.components.items():
            if name == "scheduler" or name.startswith("tokenizer"):
                setattr(twin, name, copy.deepcopy(part))
        twin._sepme_request, twin._sepme_running, twin._sepme_last = request, None, None
        with erasures.lock:
            erasures.requests.add(request)
        return twin

    # --- checks

    def check_erased(self) -> tuple[str, ...]:
        """Check, without drawing, what a call checks: that what is erased would act. Return what is erased.

        Raises:
            ErasureNotInForce: If it would not, with the reason.
        """
        erasures = self._erasures()
        snapshot = erasures.snapshot
        strengths = self._default(snapshot)
        self._least(erasures, snapshot, [strengths], {})
        return tuple(snapshot.names.shown[key] for key in strengths)

    @property
    def last_call(self) -> Receipt | None:
        """What was in force in the last call of this pipeline object that ended well; None before the first."""
        return self._sepme_last

    def _main(self) -> dict[str, nn.Module]:
        """The denoisers that draw."""
        return drawing_denoisers(self)

    def _erasures(self) -> Erasures:
        """What is loaded on the denoisers, refusing to go on if it was lost with a denoiser that was swapped away."""
        used, main = self._sepme_used, self._main()
        if used is not None and used.snapshot.banks and any(erasures_of(m) is not used for m in main.values()):
            raise ErasureNotInForce(
                f"this pipeline had loaded {list(used.snapshot.banks)}, but its UNet has been replaced "
                f"({', '.join(main)}); call unload_sepme() and load the banks again"
            )
        erasures = erasures_on(main)
        # A copy for a request goes by what its pipeline loads and unloads.
        if self._sepme_request is None and (lost := sorted(self._sepme_banks - erasures.snapshot.banks.keys())):
            raise ErasureNotInForce(
                f"this pipeline had loaded {lost}, which a pipeline that shares its denoiser has unloaded; call "
                "unload_sepme() and load the banks again"
            )
        self._sepme_used = erasures
        return erasures

    def _snapshot(self) -> Snapshot:
        return self._erasures().snapshot

    @staticmethod
    def _known_bank(name: str, snapshot: Snapshot) -> str:
        if name not in snapshot.banks:
            raise ValueError(f"no bank {name!r} is loaded; loaded: {list(snapshot.banks)}")
        return name

    def _refuse_other_base(self, bank: ConceptBank) -> None:
        """Check that a bank was made for this pipeline's text encoders and, where that matters, denoiser."""
        per_module = any(entry.increment.form == "module" for entry in bank.values())
        for name, denoiser in self._main().items():
            if per_module and (others := other_text_readers(denoiser)):
                raise ValueError(
                    f"the bank has per-module increments, which act behind attn2.to_k and attn2.to_v alone, but in "
                    f"this {name} other modules read the text as well: {others[:5]}. Text-side increments "
                    "(solver='closed_form') act on whatever reads it"
                )
            refuse_other_weights(bank, projection_weights(denoiser))
        refuse_other_text(self, [bank])

    def _least(
        self, erasures: Erasures, snapshot: Snapshot, sets: Sequence[Strengths], asked: Mapping[str, Any]
    ) -> float:
        """See that what is erased will act, and return what a reading must exceed to count.

        Raises:
            ErasureNotInForce: If it would not, with the reason.
        """
        keys = {key for strengths in sets for key in strengths}
        if not keys:
            return 0.0
        names = [snapshot.names.shown[key] for key in keys]
        try:
            erasures.renew()
            erasures.check(self._main().values())
            self._check_weights(snapshot, keys)
            helpers = self._helpers()
            follow(erasures, helpers)
            if helpers and snapshot.has_per_module:
                logger.warning(
                    "per-module increments act on the UNet alone: %s go on reading the unedited prompt. Text-side "
                    "increments (solver='closed_form') act on both",
                    [type(helper).__name__ for helper in helpers],
                )
            if not text_encoders(self):
                return 0.0
            least = self._text_check(snapshot).least(self, **encode_settings(self, asked))
            self._refuse_rounded_away(snapshot, keys, least)
        except ErasureNotInForce as error:
            raise ErasureNotInForce(f"{sorted(names)} should be erased, but {error}") from error
        return least

    def _text_check(self, snapshot: Snapshot) -> TextCheck:
        check = self._sepme_check
        if check is None or getattr(check, "stacks", None) is not snapshot.stacks:
            check = TextCheck(snapshot.banks)
            check.stacks = snapshot.stacks
            self._sepme_check = check
        return check

    def _refuse_rounded_away(self, snapshot: Snapshot, keys: Iterable[Key], least: float) -> None:
        """Check that increments read more of their concepts than rounding takes away at this precision."""
        dtype = text_encoders(self)[0].dtype
        for key in keys:
            entry = snapshot.banks[key[0]][key[1]]
            reach = entry.metrics.get("reach")
            d = entry.increment.A.shape[1]
            lost = max(least, rounding_share(d, torch.finfo(dtype).eps + entry.increment.coarseness))
            if isinstance(reach, float) and reach <= lost:
                raise ErasureNotInForce(
                    f"the increment of {snapshot.names.shown[key]!r} reads {reach:.1e} of its concept, and {dtype} "
                    f"embeddings are exact to {lost:.1e}: use float32, or make it again with fewer guards"
                )

    def _check_weights(self, snapshot: Snapshot, keys: Iterable[Key]) -> None:
        if all(snapshot.banks[bank][concept].increment.form == "text" for bank, concept in keys):
            return
        for denoiser in self._main().values():
            weights = projection_weights(denoiser)
            for bank in {bank for bank, _ in keys}:
                try:
                    refuse_other_weights(snapshot.banks[bank], weights)
                except ValueError as error:
                    raise ErasureNotInForce(
                        f"the weights are no longer those that it was loaded on: {error}"
                    ) from error

    # --- a call

    def _erasing_call(
        self, plain_call: Callable[..., Any], args: tuple[Any, ...], erased: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Run a call of the plain pipeline under an erased set."""
        asked = _asked(plain_call, self, args, kwargs)
        erasures = self._erasures()
        self._sepme_banks = frozenset(erasures.snapshot.banks)
        record = record_of_thread()
        if record is not None and record.alive and record.unedited and record.erasures is erasures:
            return plain_call(self, *args, **kwargs)
        snapshot = erasures.snapshot
        pictures = _number_of_prompts(asked) * _images_per_prompt(asked)
        sets, own = self._sets(erased, asked, snapshot)
        something = any(sets)
        self._obey_host(snapshot, own, something, asked)
        least = self._least(erasures, snapshot, sets, asked)
        fixed_shape = any(is_compiled(component) for component in self._denoising_components())
        pictures = max(pictures, 1)
        active = snapshot.active(sets, pictures, fixed_shape, least)
        call = Call(erasures, snapshot, sets, active, own, pictures, least=least, fixed_shape=fixed_shape)
        try:
            self._claim(erasures, call)
            with opened(call):
                output = plain_call(self, *args, **kwargs)
                if something:
                    self._see_that_it_acted(erasures, call)
        except ErasureNotInForce as error:
            names = call.names()
            if not names or str(error).startswith(f"{sorted(names)} should be erased"):
                raise
            raise ErasureNotInForce(f"{sorted(names)} should be erased, but {error}") from error
        finally:
            self._release(erasures, call)
        self._sepme_last = self._receipt(call, asked, something)
        if hasattr(output, "__dataclass_fields__"):
            output.erased = self._sepme_last
        return output

    def _claim(self, erasures: Erasures, call: Call) -> None:
        """Make this call the one that the pipeline object runs.

        Raises:
            RuntimeError: If it runs one already, in another thread or in a callback.
        """
        with erasures.lock:
            running = self._sepme_running() if self._sepme_running is not None else None
            if running is not None and running.alive and call.snapshot.banks:
                raise RuntimeError(
                    "this pipeline object is already running a call, in another thread or in a callback; schedulers "
                    "and tokenizers cannot be shared by calls. Use pipe.for_request(), a light copy, for each"
                )
            self._sepme_running = weakref.ref(call)
            erasures.begin(call)

    def _release(self, erasures: Erasures, call: Call) -> None:
        """Let the pipeline object run another call; one that was refused leaves the running one as it is."""
        with erasures.lock:
            erasures.end(call)
            if self._sepme_running is not None and self._sepme_running() is call:
                self._sepme_running = None

    def _sets(self, erased: Any, asked: Mapping[str, Any], snapshot: Snapshot) -> tuple[list[dict[Key, float]], bool]:
        """The erased set of each picture of a call, or one set for all of them; and whether it is the call's own."""
        request = self._sepme_request
        if erased is None:
            return [self._default(snapshot)], request is not None and request.default is not None
        floors = self._floors(snapshot)
        if not isinstance(erased, (str, Mapping)):
            erased = list(erased)  # looked at more than once: a generator must not run dry and erase nothing
        if isinstance(erased, (str, Mapping)) or all(isinstance(name, str) for name in erased):
            return [snapshot.ordered(with_floors(self._strengths_of(erased, snapshot), floors))], True
        n_prompts = _number_of_prompts(asked)
        if len(erased) != n_prompts:
            raise ValueError(
                f"{len(erased)} erased sets for {n_prompts} prompts; give one set per prompt, or one for all"
            )
        if len(erased) > 1 and any(part in type(self).__name__ for part in _MIXING_ROWS):
            raise ValueError(
                f"{type(self).__name__} mixes the rows of several prompts, so one erased set per prompt cannot be "
                "kept apart; call once for each set"
            )
        own = [
            self._default(snapshot) if concepts is None
            else snapshot.ordered(with_floors(self._strengths_of(concepts, snapshot), floors))
            for concepts in erased
        ]  # fmt: skip
        sets = [strengths for strengths in own for _ in range(_images_per_prompt(asked))]
        said = None not in erased or (request is not None and request.default is not None)
        return (sets[:1] if all(strengths == sets[0] for strengths in sets) else sets), said

    def _obey_host(self, snapshot: Snapshot, own: bool, something: bool, asked: Mapping[str, Any]) -> None:
        """Check a call against the rules of hosts that loaded a bank with `strict=True`."""
        if not snapshot.strict:
            return
        if not own:
            raise ErasureNotInForce(
                "a bank was loaded with strict=True, and this call does not say what it erases; give erased=[...], "
                "which may be empty, or use pipe.for_request(erased=[...])"
            )
        if something and not snapshot.allow_embeddings:
            refuse_callers_embeddings(asked)
            for vocabularies in {options.vocabularies for options in snapshot.options.values()}:
                if vocabularies is not None:
                    vocabularies.refuse_others(self)
            if not text_encoders(self):
                raise ErasureNotInForce(
                    "the pipeline has no text encoder, so what a prompt's embedding is cannot be seen"
                )
        if something and not snapshot.allow_images:
            refuse_image_prompts(asked)

    def _see_that_it_acted(self, erasures: Erasures, call: Call) -> None:
        """See, after the last step, that the hooks were there for all of the call."""
        if not call.ran:
            raise ErasureNotInForce(
                "no pass of the denoiser was seen in this call: it ran elsewhere, or its hooks were removed. A thread "
                "that runs the denoiser for a call must open its record: call = current_call(), `with call:` there"
            )
        erasures.check(self._main().values())
        if call.active is not None and call.active.doors:
            see_that_helpers_acted(call, self._helpers())

    def _helpers(self) -> list[nn.Module]:
        """The denoisers that help the others (ControlNets)."""
        return [module for module in denoisers_of(self).values() if is_helper(module)]

    def _receipt(self, call: Call, asked: Mapping[str, Any], something: bool) -> Receipt:
        encoder = ("verified" if text_encoders(self) else "unverified") if something else "not asked"
        text = "unknown" if any(name.endswith("prompt_embeds") for name in _given(asked)) else "known"
        images = tuple(name for name in _given(asked) if name.startswith("ip_adapter_image"))
        return Receipt(call, encoder, text, images)

    def _denoising_components(self) -> list[nn.Module]:
        names = {name.split(".")[0] for name in denoisers_of(self)}
        return [self.components[name] for name in names]

    def __reduce__(self) -> Any:
        """Pickled by the plain class: that of an attached pipeline is made when it is first needed."""
        if type(self) in (SepMEPipeline, SepMEXLPipeline):
            return _rebuilt, (type(self), False, self._state())
        return _rebuilt, (type(self).__mro__[2], True, self._state())

    def _state(self) -> dict[str, Any]:
        here = {"_sepme_running": None, "_sepme_last": None, "_sepme_check": None}
        return {**self.__dict__, **{name: value for name, value in here.items() if name in self.__dict__}}


def _rebuilt(kind: type, attached: bool, state: dict[str, Any]) -> Any:
    pipe = object.__new__(_attached_class(kind) if attached else kind)
    pipe.__dict__.update(state)
    return pipe


def _erasing_call(plain_call: Callable[..., Any]) -> Callable[..., Any]:
    """The `__call__` of a pipeline class: the plain one's parameters, and `erased`."""

    @wraps(plain_call)
    def __call__(self: Any, *args: Any, erased: Any = None, **kwargs: Any) -> Any:
        return self._erasing_call(plain_call, args, erased, kwargs)

    plain = inspect.signature(plain_call)
    last = [p for p in plain.parameters.values() if p.kind is p.VAR_KEYWORD]
    others = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
    mine = inspect.Parameter("erased", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Any)
    __call__.__signature__ = plain.replace(parameters=[*others, mine, *last])
    __call__.__doc__ = _CALL_DOC + (plain_call.__doc__ or "")
    return __call__


_CALL_DOC = """Generate under an erased set; refuse to if it would not act.

        The plain pipeline's parameters, and:

        Args:
            erased: What is erased for this call alone: names or {name: strength} for all its prompts, or a list with
                one such set per prompt, None in it standing for the standing set. Default: the standing set.

        Raises:
            ErasureNotInForce: If an erasure that was asked for would not act, or did not.
            ValueError: As `set_erased`, or if there are not as many sets as prompts.
            TypeError: On a keyword that the plain pipeline does not name.
            RuntimeError: If this pipeline object runs a call already.

        The plain pipeline's documentation:

        """


def _asked(plain_call: Callable[..., Any], pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name.

    Raises:
        TypeError: On a keyword that the pipeline does not name: plain pipelines ignore it, and with it what it meant.
    """
    signature = inspect.signature(plain_call)
    named = {name for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    if unknown := sorted(set(kwargs) - named - _DEPRECATED):
        near = difflib.get_close_matches(unknown[0].strip("_").lower(), [*named, "erased"], 1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(
            f"unexpected keyword argument {unknown[0]!r}{hint}. {type(pipe).__name__} takes "
            f"{sorted(named - {'self'})} and 'erased'"
        )
    return signature.bind_partial(pipe, *args, **kwargs).arguments


def _given(asked: Mapping[str, Any]) -> list[str]:
    return [name for name, value in asked.items() if value is not None]


def _number_of_prompts(asked: Mapping[str, Any]) -> int:
    prompt = asked.get("prompt")
    if prompt is None:
        prompt = asked.get("prompt_embeds")
    if prompt is None or isinstance(prompt, str):
        return 0 if prompt is None else 1
    return len(prompt)


def _images_per_prompt(asked: Mapping[str, Any]) -> int:
    return next((asked[name] for name in _IMAGES if asked.get(name)), 1)


def _bank_of(source: str | Path | ConceptBank, concepts: Iterable[str] | None, hub: dict[str, Any]) -> ConceptBank:
    if isinstance(source, ConceptBank):
        if hub:
            raise TypeError(f"a ConceptBank takes no {sorted(hub)}; they are for a repository id or a folder")
        return source if concepts is None else source.subset(concepts)
    return ConceptBank.from_pretrained(source, concepts=concepts, **hub)


def _name_of(source: str | Path | ConceptBank) -> str:
    return "bank" if isinstance(source, ConceptBank) else Path(source).name


class SepMEPipeline(SepMELoaderMixin, StableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x with a concept bank.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, pocket
        >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
        >>> pipe.load_sepme(pocket.bank("styles"))
        >>> pipe.set_erased(["woodcut", "neon"])
        >>> pipe.restore("neon")
        >>> pipe.erased
        ('woodcut',)
    """


class SepMEXLPipeline(SepMELoaderMixin, StableDiffusionXLPipeline):
    """Stable Diffusion XL with a concept bank.

    Increments edit what cross-attention reads, both text encoders side by side, and the pooled embedding beside it.
    """


# diffusers looks classes up by name when it saves, reloads and converts pipelines (AutoPipeline): what these save is a
# plain pipeline, which loads without this package.
SepMEPipeline.__name__ = StableDiffusionPipeline.__name__
SepMEXLPipeline.__name__ = StableDiffusionXLPipeline.__name__


@cache
def _attached_class(plain: type) -> type:
    return type(plain.__name__, (SepMELoaderMixin, plain), {"__module__": plain.__module__})


def attach(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Give a pipeline `load_sepme`, `set_erased` and the rest; for image-to-image, inpainting and others.

    Its class keeps its name, so saving, reloading and `AutoPipeline` go on as before.

    Args:
        pipe: Any pipeline with a denoiser of a known family and an `encode_prompt`.

    Raises:
        TypeError: If it has no such denoiser, or no `encode_prompt`.

    Example:
        >>> from diffusers import StableDiffusionImg2ImgPipeline
        >>> from sepme_diffusers import attach, pocket
        >>> pipe = attach(StableDiffusionImg2ImgPipeline.from_pretrained(pocket.path()))
        >>> pipe.load_sepme(pocket.bank("styles"))
    """
    if isinstance(pipe, SepMELoaderMixin):
        return pipe
    if not hasattr(pipe, "encode_prompt"):
        raise TypeError(f"{type(pipe).__name__} has no encode_prompt; SepME erases on pipelines that have one")
    denoisers_of(pipe)
    pipe.__class__ = _attached_class(type(pipe))
    return pipe
