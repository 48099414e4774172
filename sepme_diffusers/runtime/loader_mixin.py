"""SepMELoaderMixin: the methods by which a pipeline loads banks and erases any subset of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffusers.utils import logging

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import has_per_module, refuse_other_text, refuse_other_weights
from sepme_diffusers.bank.errors import PolicyError
from sepme_diffusers.doors.linears import other_text_readers, projection_weights
from sepme_diffusers.doors.registry import drawing_denoisers
from sepme_diffusers.runtime.call_sets import ErasedSet, Request, default_set, floors, strengths_of
from sepme_diffusers.runtime.checks import check_before
from sepme_diffusers.runtime.comparison import Comparison, compare
from sepme_diffusers.runtime.erased_sets import Key, Strengths, UnknownConceptError, with_floors
from sepme_diffusers.runtime.erasing_call import erasing_call, naming
from sepme_diffusers.runtime.erasures import Erasures, erasures_of
from sepme_diffusers.runtime.explaining import Explainer
from sepme_diffusers.runtime.explanation import Explanation
from sepme_diffusers.runtime.pipeline_state import PipelineState
from sepme_diffusers.runtime.receipt import Receipt
from sepme_diffusers.runtime.snapshot import LoadOptions, Snapshot
from sepme_diffusers.runtime.vocabularies import Vocabularies

logger = logging.get_logger(__name__)

_STATE = "_sepme_state"


class SepMELoaderMixin:
    """`load_sepme`, `set_erased`, `erase`, `restore`, `unload_sepme` for a pipeline whose denoiser reads text.

    What is loaded and erased lives on the denoiser: pipelines that share it (`from_pipe`) share it too.
    """

    components: Mapping[str, Any]  # a diffusers pipeline's

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain = next(
            (kind for kind in cls.__mro__ if not issubclass(kind, SepMELoaderMixin) and "__call__" in vars(kind)), None
        )
        if plain is not None and "__call__" not in vars(cls):
            cls.__call__ = erasing_call(plain.__call__)  # type: ignore[method-assign]

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
        source = pretrained_model_name_or_path_or_bank
        bank, name = _bank_of(source, concepts, hub), name or _name_of(source)
        erasures = self._erasures()
        erasures.refuse_taken(name)
        self._refuse_other_base(bank)
        vocabularies = Vocabularies.of(self) if strict and not allow_embeddings else None
        options = LoadOptions(strict, allow_embeddings, allow_images, plain_pipelines == "standing", vocabularies)
        erasures.load(name, bank, options)
        self._sepme.remember(erasures)
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
        _refuse_unknown(name, erasures.snapshot)
        new = _bank_of(bank, concepts, hub)
        self._refuse_other_base(new)
        erasures.replace(name, new, erased)

    def unload_sepme(self, bank: str | None = None) -> None:
        """Take a bank away, by name, or all of them: the pipeline is the plain one again, bit for bit.

        Raises:
            ValueError: If no bank has that name. Nothing changes then.
            PolicyError: If its policy always erases something; `replace_bank` lifts that. Nothing changes then.
        """
        state, denoisers = self._sepme, drawing_denoisers(self).values()
        loaded = [erasures for denoiser in denoisers if (erasures := erasures_of(denoiser)) is not None]
        here = loaded[0] if loaded else None
        if bank is None and state.erasures not in (None, here):
            # The denoiser was replaced by one without the banks: nothing is to be taken away, only forgotten.
            state.erasures, state.banks = None, frozenset()
            return
        erasures = state.erasures or here
        if bank is not None:
            _refuse_unknown(bank, erasures.snapshot if erasures is not None else Snapshot())
        if erasures is not None:
            names = set(erasures.snapshot.banks) if bank is None else {bank}
            remembered, state.banks = state.banks, state.banks - names
            try:
                erasures.unload(names)
            except PolicyError:
                state.banks = remembered
                raise

    def get_bank(self, name: str | None = None) -> ConceptBank | None:
        """Return a loaded bank: the only one, or the one of that name; None if nothing is loaded.

        Raises:
            ValueError: If no bank has that name, or several are loaded and no name is given.
        """
        snapshot = self._erasures().snapshot
        if name is not None:
            _refuse_unknown(name, snapshot)
            return snapshot.banks[name]
        if len(snapshot.banks) > 1:
            raise ValueError(f"several banks are loaded; say which of {list(snapshot.banks)}")
        return next(iter(snapshot.banks.values()), None)

    # --- the erased set

    @property
    def erasable(self) -> tuple[str, ...]:
        """The concepts that `set_erased` accepts."""
        return tuple(self._erasures().snapshot.names.shown.values())

    @property
    def erased(self) -> tuple[str, ...]:
        """The concepts that a call without `erased=` erases now."""
        snapshot = self._erasures().snapshot
        return tuple(snapshot.names.shown[key] for key in default_set(snapshot, self._sepme.request))

    def set_erased(self, concepts: ErasedSet) -> None:
        """Erase exactly these concepts from the next call on; everything else is restored. Absolute and idempotent.

        What loaded banks always erase is added. A call that is running keeps the set that it began with.

        Args:
            concepts: Names, or {name: strength}; 1 is the strength it was made with.

        Raises:
            TypeError: If a single string is given, or a name is no string.
            UnknownConceptError: On a name that is unknown (with the nearest one) or shared by two banks.
            ValueError: If a name is given twice, or a strength is not a number from 2^-20 to 2^10.
            BankError: If the numbers of an increment are not what the bank's manifest says. Whenever it raises, what
                was erased before stays erased.
        """
        self._erasures().erase_exactly(lambda snapshot: strengths_of(concepts, snapshot))

    def erase(self, *concepts: str) -> None:
        """Erase these concepts as well, at full strength. Raises as `set_erased` does."""
        self._erasures().erase_exactly(
            lambda snapshot: {**snapshot.standing, **dict.fromkeys(_keys(concepts, snapshot), 1.0)}
        )

    def restore(self, *concepts: str) -> None:
        """Restore these concepts, exactly; every other erasure stays as it is.

        Raises:
            UnknownConceptError: As `set_erased`.
            PolicyError: If a loaded bank, or the owner of the request, always erases one of them.
        """

        def without(snapshot: Snapshot) -> Strengths:
            keys = _keys(concepts, snapshot)
            self._refuse_lifting(keys, snapshot)
            return {key: strength for key, strength in snapshot.standing.items() if key not in keys}

        self._erasures().erase_exactly(without)

    def restore_all(self) -> None:
        """Restore every concept, exactly.

        Raises:
            PolicyError: If a loaded bank, or the owner of the request, always erases something.
        """

        def nothing(snapshot: Snapshot) -> Strengths:
            self._refuse_lifting(list(snapshot.names.shown), snapshot)
            return {}

        self._erasures().erase_exactly(nothing)

    def _refuse_lifting(self, keys: Iterable[Key], snapshot: Snapshot) -> None:
        always = floors(snapshot, self._sepme.request)
        if kept := [snapshot.names.shown[key] for key in keys if key in always]:
            raise PolicyError(
                f"a policy always erases {kept}: that of a loaded bank (replace_bank() lifts it), or what "
                "for_request(always=...) was given"
            )

    # --- requests

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
        erasures, state = self._erasures(), self._sepme
        snapshot = erasures.snapshot
        request = Request(
            with_floors(strengths_of(always, snapshot), state.request.always),
            state.request.default if erased is None else strengths_of(erased, snapshot),
        )
        state.text_check_for(snapshot)  # shared by the copies, so that not each of them reads the guards anew
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.__dict__[_STATE] = state.for_request(request)
        for name, part in self.components.items():
            if name == "scheduler" or name.startswith("tokenizer"):
                setattr(twin, name, copy.deepcopy(part))
        with erasures.lock:
            erasures.requests.add(request)
        return twin

    # --- checks

    def check_erased(self) -> tuple[str, ...]:
        """Check, without drawing, what a call checks: that what is erased would act. Return what is erased.

        Raises:
            ErasureNotInForce: If it would not, with the reason.
        """
        erasures, state = self._erasures(), self._sepme
        snapshot = erasures.snapshot
        keys = default_set(snapshot, state.request)
        names = tuple(snapshot.names.shown[key] for key in keys)
        with naming(names):
            check_before(self, erasures, snapshot, keys, state.text_check_for(snapshot), {})
        return names

    def explain(
        self, prompt: str | Iterable[str], concepts: Iterable[str] | None = None, limit: int = 20
    ) -> Explanation:
        """Tell why a call with this prompt is changed by what is loaded, or why not, without drawing.

        What is said of a concept is what a call that erases it decides by. The prompt is read by the text encoder; the
        denoiser does not run, and nothing that is loaded or erased changes. While a call runs in another thread, use
        `for_request()`.

        Args:
            prompt: A prompt, or several. A negative prompt is one more prompt: either may open a gate.
            concepts: Their names. Default: all that are erasable.
            limit: How many are listed for each prompt: those that act, then the nearest to it; what is erased goes
                before what is not. The others are counted.

        Raises:
            TypeError: If a prompt is no string, or a single string is given for the concepts.
            UnknownConceptError: As `set_erased`.
            ValueError: If there is no prompt, a concept is given twice, or the limit is no number above zero.
            ErasureNotInForce: If the pipeline has no text encoder, or another one than the banks were made for.

        Example:
            >>> from sepme_diffusers import SepMEPipeline, pocket
            >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
            >>> pipe.load_sepme(pocket.bank("styles"))
            >>> pipe.set_erased(["neon"])
            >>> seen = pipe.explain("a neon cat").prompts[0]["neon"]
            >>> seen.erased, seen.acts, seen.doors[0].word
            (True, True, 'neon')
        """
        erasures, state = self._erasures(), self._sepme
        snapshot = erasures.snapshot
        keys = list(snapshot.names.shown) if concepts is None else list(strengths_of(concepts, snapshot))
        explainer = Explainer(self, snapshot, state.request, state.text_check_for(snapshot))
        return explainer.explain(prompt, keys, limit)

    def compare(
        self,
        prompt: str | Sequence[str],
        sets: Sequence[ErasedSet | None] | None = None,
        seeds: int | Sequence[int] = 0,
        **call: Any,
    ) -> Comparison:
        """Draw prompts from the same noise once per erased set. What is erased stays as it is.

        Args:
            prompt: One or several.
            sets: Erased sets, one per column: names or {name: strength}; None in it stands for what is erased now.
                Default: nothing, what is erased now, and nothing again, called "restored".
            seeds: Of the noise: one for all prompts, or one per prompt.
            call: Passed on to the pipeline: `num_inference_steps`, `guidance_scale`, ...

        Raises:
            ValueError: If nothing is erased and no sets are given, or seeds and prompts differ in number.
            UnknownConceptError: As `set_erased`.
            TypeError: If a set is a single string, or on an argument that the comparison says itself (`erased`,
                `generator`, `output_type`, ...).
            ErasureNotInForce: As a call.
        """
        return compare(self, self._erasures().snapshot, self._sepme.request, prompt, sets, seeds, call)

    @property
    def last_call(self) -> Receipt | None:
        """What was in force in the last call of this pipeline object that ended well; None before the first."""
        return self._sepme.last_call

    @property
    def _sepme(self) -> PipelineState:
        return self.__dict__.setdefault(_STATE, PipelineState())

    def _erasures(self) -> Erasures:
        return self._sepme.find(drawing_denoisers(self))

    def _refuse_other_base(self, bank: ConceptBank) -> None:
        """Check that a bank was made for this pipeline's text encoders and, where that matters, denoiser."""
        for name, denoiser in drawing_denoisers(self).items() if has_per_module(bank) else ():
            if others := other_text_readers(denoiser):
                raise ValueError(
                    f"the bank has per-module increments, which act behind attn2.to_k and attn2.to_v alone, but in "
                    f"this {name} other modules read the text as well: {others[:5]}. Text-side increments "
                    "(solver='closed_form') act on whatever reads it"
                )
            refuse_other_weights(bank, projection_weights(denoiser))
        refuse_other_text(self, [bank])


def _keys(concepts: Sequence[str], snapshot: Snapshot) -> list[Key]:
    if not snapshot.banks:
        raise UnknownConceptError(
            f"{list(concepts)} cannot be erased or restored: no bank is loaded; call load_sepme() first"
        )
    return snapshot.names.keys(concepts)


def _refuse_unknown(bank: str, snapshot: Snapshot) -> None:
    if bank not in snapshot.banks:
        raise ValueError(f"no bank {bank!r} is loaded; loaded: {list(snapshot.banks)}")


def _bank_of(source: str | Path | ConceptBank, concepts: Iterable[str] | None, hub: dict[str, Any]) -> ConceptBank:
    if isinstance(source, ConceptBank):
        if hub:
            raise TypeError(f"a ConceptBank takes no {sorted(hub)}; they are for a repository id or a folder")
        return source if concepts is None else source.subset(concepts)
    return ConceptBank.from_pretrained(source, concepts=concepts, **hub)


def _name_of(source: str | Path | ConceptBank) -> str:
    return "bank" if isinstance(source, ConceptBank) else Path(source).name
