"""Pipelines that load concept banks and erase any subset of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging
from torch import nn

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import refuse_other_text, refuse_other_weights, text_state
from sepme_diffusers.doors.linears import is_compiled, plain, projection_weights, text_projections
from sepme_diffusers.runtime.erasures import ErasureNotInForce, Erasures, erasures_of
from sepme_diffusers.runtime.names import Key

logger = logging.get_logger(__name__)


class SepMELoaderMixin:
    """`load_sepme`, `set_erased`, `erase`, `restore`, `unload_sepme` for a pipeline whose `unet` attends to text.

    What is loaded and erased lives on the UNet: pipelines that share it (`from_pipe`) share it too.
    """

    # The erasures that this pipeline last used, to notice a UNet that was swapped for one without them.
    _sepme_used: Erasures | None = None
    _sepme_text: tuple[Any, ...] = ()

    def load_sepme(
        self,
        pretrained_model_name_or_path_or_bank: str | Path | ConceptBank,
        name: str | None = None,
        concepts: Iterable[str] | None = None,
        **hub: Any,
    ) -> None:
        """Make a bank's concepts erasable. Erases nothing, unless the bank's policy says so.

        Several banks can be loaded; what the others erase stays as it is.

        Args:
            pretrained_model_name_or_path_or_bank: A Hub repository id, a folder, or a ConceptBank.
            name: What to call the bank where two of them share a concept ("name/concept"). Default: the last part of
                the repository id or folder; "bank" for a ConceptBank.
            concepts: Load (and download) these alone. Default: all.
            hub: `cache_dir`, `force_download`, `local_files_only`, `token`, `revision`, `subfolder`, see
                `ConceptBank.from_pretrained`.

        Raises:
            BankError: If the bank cannot be trusted or understood.
            ValueError: If it was made for another base, or its name is taken. Nothing changes then.
            KeyError: If the bank lacks one of `concepts`.
        """
        source = pretrained_model_name_or_path_or_bank
        if isinstance(source, ConceptBank):
            if hub:
                raise TypeError(f"a ConceptBank takes no {sorted(hub)}; they are for a repository id or a folder")
            bank = source if concepts is None else source.subset(concepts)
        else:
            bank = ConceptBank.from_pretrained(source, concepts=concepts, **hub)
        name = name or ("bank" if isinstance(source, ConceptBank) else Path(source).name)
        erasures = self._erasures()
        if erasures is not None and name in erasures.banks:
            raise ValueError(
                f"a bank named {name!r} is loaded already; load this one under another name=, or "
                f"unload_sepme({name!r}) first"
            )
        refuse_other_weights(bank, projection_weights(self.unet))
        refuse_other_text(self, [bank])
        self._add(name, bank, erasures)
        self._sepme_text = text_state(self)
        logger.info("loaded %d erasable concepts as %r", len(bank), name)

    def _add(self, name: str, bank: ConceptBank, erasures: Erasures | None) -> None:
        always = {(name, concept): 1.0 for concept in bank.always}
        if erasures is not None:
            erasures.load(name, bank, erasures.active | always)
            return
        erasures = Erasures(self.unet)
        try:
            erasures.load(name, bank, always)
        except BaseException:
            erasures.remove(self.unet)
            raise
        self._sepme_used = erasures

    def unload_sepme(self, bank: str | None = None) -> None:
        """Take a bank away, by name, or all of them: the pipeline is the plain one again, bit for bit.

        Raises:
            ValueError: If no bank has that name, or its policy always erases something. Nothing changes then.
        """
        erasures = erasures_of(self.unet)
        if bank is not None and (erasures is None or bank not in erasures.banks):
            raise ValueError(f"no bank {bank!r} is loaded; loaded: {list(erasures.banks) if erasures else []}")
        if erasures is not None:
            names = list(erasures.banks) if bank is None else [bank]
            if always := [concept for name in names for concept in erasures.banks[name].always]:
                raise ValueError(f"the bank's policy always erases {always}; it cannot be unloaded")
            if len(names) == len(erasures.banks):
                erasures.remove(self.unet)
                erasures = None
            else:
                erasures.unload(bank)
        self._sepme_used = erasures

    def get_bank(self, name: str | None = None) -> ConceptBank | None:
        """A loaded bank: the only one, or the one of that name; None if nothing is loaded.

        Raises:
            ValueError: If no bank has that name, or several are loaded and no name is given.
        """
        erasures = self._erasures()
        banks = erasures.banks if erasures else {}
        if name is None and len(banks) > 1:
            raise ValueError(f"several banks are loaded; say which of {list(banks)}")
        if name is not None and name not in banks:
            raise ValueError(f"no bank {name!r} is loaded; loaded: {list(banks)}")
        return banks[name] if name is not None else next(iter(banks.values()), None)

    @property
    def erasable(self) -> tuple[str, ...]:
        """The concepts that `set_erased` accepts."""
        erasures = self._erasures()
        return tuple(erasures.names.shown.values()) if erasures else ()

    @property
    def erased(self) -> tuple[str, ...]:
        """The concepts that are erased now."""
        erasures = self._erasures()
        return tuple(erasures.names.shown[key] for key in erasures.active) if erasures else ()

    def set_erased(self, concepts: Iterable[str] | Mapping[str, float]) -> None:
        """Erase exactly these concepts; everything else is restored. Absolute and idempotent.

        It acts at once, also on a call that is running without `erased=`.

        Args:
            concepts: Names, or {name: strength}; 1 is the strength it was made with.

        Raises:
            TypeError: If a single string is given, or a name is no string.
            ValueError: On a name that is unknown (with the nearest one), given twice or shared by two banks, a
                strength that is not a finite number above zero, or if a bank's policy forbids it. What was erased
                stays erased then.
        """
        strengths = self._strengths_of(concepts)
        if (erasures := self._erasures()) is not None:
            erasures.activate(strengths)

    def _strengths_of(self, concepts: Iterable[str] | Mapping[str, float]) -> dict[Key, float]:
        """An erased set by key, every rule of `set_erased` checked."""
        erasures = self._erasures()
        if erasures is None:
            if not isinstance(concepts, str) and not list(concepts):
                return {}
            raise ValueError(f"cannot erase {concepts!r}: no bank is loaded; call load_sepme() first")
        strengths = erasures.names.strengths(concepts)
        _obey_policies(erasures, strengths)
        return strengths

    def erase(self, *concepts: str) -> None:
        """Erase these concepts as well, at full strength. Raises as `set_erased` does."""
        self._change(concepts, lambda active, keys: active | dict.fromkeys(keys, 1.0))

    def restore(self, *concepts: str) -> None:
        """Restore these concepts, exactly; every other erasure stays as it is. Raises as `set_erased` does."""
        self._change(concepts, lambda active, keys: {key: s for key, s in active.items() if key not in keys})

    def restore_all(self) -> None:
        """Restore every concept, exactly. Raises as `set_erased` does."""
        self.set_erased([])

    def _change(self, concepts: tuple[str, ...], change: Any) -> None:
        erasures = self._erasures()
        if erasures is None:
            raise ValueError(f"{list(concepts)} cannot be erased or restored: no bank is loaded; call load_sepme()")
        strengths = change(erasures.active, erasures.names.keys(concepts))
        _obey_policies(erasures, strengths)
        erasures.activate(strengths)

    def _erasures(self) -> Erasures | None:
        """The erasures on the UNet, refusing to go on if they were lost with a UNet that was swapped away."""
        erasures, used = erasures_of(self.unet), self._sepme_used
        if used is not None and erasures is not used:
            raise ErasureNotInForce(
                f"this pipeline had loaded {list(used.banks)}, but its UNet has been replaced or the banks unloaded "
                "by a pipeline that shares it; call unload_sepme() and load the banks again"
            )
        self._sepme_used = erasures
        return erasures

    def __call__(self, *args: Any, erased: Any = None, **kwargs: Any) -> Any:
        """Generate, see the plain pipeline.

        Args:
            args: Of the plain pipeline.
            erased: What is erased for this call alone: names or {name: strength} for all its prompts, or a list with
                one such set a prompt. Default: what `set_erased` said.
            kwargs: Of the plain pipeline.

        Raises:
            ErasureNotInForce: If an erasure that was asked for would not act.
            ValueError: As `set_erased`, or if there are not as many sets as prompts.
            TypeError: On a misspelt `erased`, which the plain pipeline would ignore.
        """
        if misspelt := [keyword for keyword in kwargs if keyword.lower().startswith("eras")]:
            raise TypeError(f"unexpected keyword argument {misspelt[0]!r}; did you mean 'erased'?")
        erasures = self._erasures()
        sets = None if erased is None else self._rows(erased, args, kwargs)
        if erasures is None:
            return super().__call__(*args, **kwargs)
        erasures.set_compiled(is_compiled(self.unet))
        if any(sets if sets is not None else [erasures.active]):
            self._see_in_force(erasures)
        with nullcontext() if sets is None else erasures.temporarily(sets):
            return super().__call__(*args, **kwargs)

    def _see_in_force(self, erasures: Erasures) -> None:
        """See, before the first step, that what is erased will act: on the UNet, with this text encoder.

        Raises:
            ErasureNotInForce: If it would not, with the reason.
        """
        erasures.check(self.unet)
        for reader in _other_readers(self):
            if not erasures.extend(reader):
                logger.warning(
                    "per-module increments act on the UNet alone: the %s goes on reading the unedited prompt. "
                    "Text-side increments (solver='closed_form') act on both",
                    type(reader).__name__,
                )
        state = text_state(self)
        if state and state != self._sepme_text:
            try:
                refuse_other_text(self, erasures.banks.values())
            except ValueError as error:
                raise ErasureNotInForce(f"the text encoder has changed: {error}") from error
            self._sepme_text = state

    def _rows(self, erased: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[Key, float]]:
        """The erased set of each picture of a call, or one set for all of them."""
        if not isinstance(erased, (str, Mapping)):
            erased = list(erased)  # looked at more than once: a generator must not run dry and erase nothing
        if isinstance(erased, (str, Mapping)) or all(isinstance(name, str) for name in erased):
            return [self._strengths_of(erased)]
        asked = inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments
        n_prompts = _number_of_prompts(asked)
        if len(erased) != n_prompts:
            raise ValueError(f"{len(erased)} erased sets for {n_prompts} prompts; give one a prompt, or one for all")
        if not isinstance(plain(self.unet), UNet2DConditionModel) and len(erased) > 1:
            raise ValueError(
                f"one erased set a prompt needs a UNet2DConditionModel, not {type(plain(self.unet)).__name__}: which "
                "rows of a video batch belong to which prompt is not known; call once for each set"
            )
        sets = [self._strengths_of(concepts) for concepts in erased]
        each = asked.get("num_images_per_prompt") or 1
        return [strengths for strengths in sets for _ in range(each)]


def _obey_policies(erasures: Erasures, strengths: Mapping[Key, float]) -> None:
    for name, bank in erasures.banks.items():
        bank.obey_policy(
            {concept: strength for (owner, concept), strength in strengths.items() if owner == name}, name
        )


def _number_of_prompts(asked: Mapping[str, Any]) -> int:
    prompt = asked.get("prompt")
    if prompt is None:
        prompt = asked.get("prompt_embeds")
    if prompt is None or isinstance(prompt, str):
        return 0 if prompt is None else 1
    return len(prompt)


def _other_readers(pipe: Any) -> list[nn.Module]:
    """Modules beside the UNet that read the same text: ControlNets."""
    controlnet = getattr(pipe, "controlnet", None)
    nets = getattr(controlnet, "nets", [controlnet])
    return [plain(net) for net in nets if net is not None]


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

    Increments edit what cross-attention reads, both text encoders side by side. SDXL's pooled embedding enters beside
    cross-attention, where they cannot reach it.
    """


# diffusers looks classes up by name when it saves, reloads and converts pipelines (AutoPipeline): what these save is a
# plain pipeline, which loads without this package.
SepMEPipeline.__name__ = StableDiffusionPipeline.__name__
SepMEXLPipeline.__name__ = StableDiffusionXLPipeline.__name__


def attach(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The same pipeline, with `load_sepme`, `set_erased` and the rest; for image-to-image, inpainting and others.

    Its class keeps its name, so saving, reloading and `AutoPipeline` go on as before.

    Args:
        pipe: Any pipeline with a `unet` that attends to text and an `encode_prompt`.

    Raises:
        TypeError: If it has no such UNet or no `encode_prompt`.
        ValueError: If its UNet has no text cross-attention.

    Example:
        >>> from diffusers import StableDiffusionImg2ImgPipeline
        >>> from sepme_diffusers import attach, pocket
        >>> pipe = attach(StableDiffusionImg2ImgPipeline.from_pretrained(pocket.path()))
        >>> pipe.load_sepme(pocket.bank("styles"))
    """
    if isinstance(pipe, SepMELoaderMixin):
        return pipe
    if getattr(pipe, "unet", None) is None or not hasattr(pipe, "encode_prompt"):
        raise TypeError(
            f"{type(pipe).__name__} has no UNet with an encode_prompt; SepME erases on pipelines that have"
        )
    text_projections(pipe.unet)
    plain = type(pipe)
    pipe.__class__ = type(plain.__name__, (SepMELoaderMixin, plain), {"__module__": plain.__module__})
    return pipe
