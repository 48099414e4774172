"""Pipelines that load a concept bank and erase any subset of it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging

from sepme_diffusers.bank import ConceptBank
from sepme_diffusers.concepts import encode, rows
from sepme_diffusers.hooks import ErasureNotInForce, Erasures, erasures_of
from sepme_diffusers.targets import projection_weights, text_projections

logger = logging.get_logger(__name__)

# A bank made for this text encoder leaks no more than its precision allows; one made for another leaks everything.
_FOREIGN_LEAKAGE = 1e-2


class SepMELoaderMixin:
    """`load_sepme`, `set_erased`, `erase`, `restore`, `unload_sepme` for a pipeline whose `unet` attends to text."""

    _sepme_bank: ConceptBank | None = None

    def load_sepme(self, bank: str | Path | ConceptBank, **hub: Any) -> None:
        """Make a bank's concepts erasable. Erases nothing, unless the bank's policy says so.

        Args:
            bank: A ConceptBank, a folder, or a Hub repository id.
            hub: See `ConceptBank.from_pretrained`.

        Raises:
            BankError: If the bank cannot be trusted or understood.
            ValueError: If it was made for another base, or a bank is loaded already. Nothing changes then.
        """
        if self._sepme_bank is not None or erasures_of(self.unet) is not None:
            raise ValueError("a concept bank is loaded already; call unload_sepme() first")
        if not isinstance(bank, ConceptBank):
            bank = ConceptBank.from_pretrained(bank, **hub)
        self._refuse_foreign(bank)
        erasures = Erasures(self.unet, bank)
        try:
            erasures.load({name: entry.increment for name, entry in bank.items()}, self.unet)
            erasures.activate(dict.fromkeys(bank.always, 1.0))
        except BaseException:
            erasures.remove(self.unet)
            raise
        self._sepme_bank = bank
        logger.info("loaded %d erasable concepts", len(bank))

    def _refuse_foreign(self, bank: ConceptBank) -> None:
        weights = projection_weights(self.unet)
        width = next(iter(weights.values())).shape[1]
        if width != bank.base.width:
            raise ValueError(
                f"the bank is for embeddings of width {bank.base.width}; this pipeline's are {width} wide"
            )
        if any(entry.increment.form == "module" for entry in bank.values()):
            shapes = {name: weight.shape[0] for name, weight in weights.items()}
            expected = {name: d_out for name, (d_out, _) in bank.base.projections.items()}
            norms = {name: float(weight.detach().float().norm()) for name, weight in weights.items()}
            if shapes != expected or any(
                abs(norms[name] - norm) > 1e-2 * norm for name, (_, norm) in bank.base.projections.items()
            ):
                raise ValueError(
                    f"the bank's per-module increments were made on {bank.base.name!r}; this UNet has other weights. "
                    "Text-side increments (solver='closed_form') serve every base with the same text encoder"
                )
        if leaks := {name: leak for name, leak in self._leaks(bank).items() if leak > _FOREIGN_LEAKAGE}:
            raise ValueError(
                "the bank was made for another text encoder than this pipeline's: with this one its increments move "
                f"the prompts that they guard (share of the embedding that they read: {leaks})"
            )

    def _leaks(self, bank: ConceptBank) -> dict[str, float]:
        """The largest ‖e Aᵀ‖ / (‖e‖ ‖A‖) of a guarded token e, for each concept."""
        prompts = list(dict.fromkeys(prompt for entry in bank.values() for prompt in entry.guards))
        embedded = dict(zip(prompts, torch.nn.functional.normalize(encode(self, prompts).cpu(), dim=-1), strict=True))
        leaks = {}
        for name, entry in bank.items():
            a = entry.increment.A.float().cpu()
            read = rows(torch.stack([embedded[prompt] for prompt in entry.guards])) @ (a / a.norm()).T
            leaks[name] = float(read.norm(dim=1).max())
        return leaks

    def unload_sepme(self) -> None:
        """Take the bank away: the pipeline is the plain one again, bit for bit.

        Raises:
            ValueError: If the bank's policy always erases something.
        """
        erasures = self._erasures()
        if erasures is None:
            return
        if erasures.bank.always:
            raise ValueError(f"the bank's policy always erases {list(erasures.bank.always)}; it cannot be unloaded")
        erasures.remove(self.unet)
        self._sepme_bank = None

    def get_bank(self) -> ConceptBank | None:
        """The loaded bank, or None."""
        erasures = self._erasures()
        return erasures.bank if erasures else None

    @property
    def erasable(self) -> tuple[str, ...]:
        """The concepts that `set_erased` accepts."""
        erasures = self._erasures()
        return erasures.loaded if erasures else ()

    @property
    def erased(self) -> tuple[str, ...]:
        """The concepts that are erased now."""
        erasures = self._erasures()
        return tuple(erasures.active) if erasures else ()

    def set_erased(self, concepts: Iterable[str] | Mapping[str, float]) -> None:
        """Erase exactly these concepts; everything else is restored. Absolute and idempotent.

        Args:
            concepts: Names, or {name: strength}; 1 is the strength it was made with.

        Raises:
            TypeError: If a single string is given.
            ValueError: On a name that is not in the bank (with the nearest one), a strength that is not a finite
                number above zero, or if the bank's policy forbids it. What was erased stays erased then.
        """
        strengths = self._strengths_of(concepts)
        if (erasures := self._erasures()) is not None:
            erasures.activate(strengths)

    def _strengths_of(self, concepts: Iterable[str] | Mapping[str, float]) -> dict[str, float]:
        """An erased set as {name: strength}, every rule of `set_erased` checked."""
        if isinstance(concepts, str):
            raise TypeError(f"give a list of concepts: [{concepts!r}], not {concepts!r}")
        strengths = dict(concepts) if isinstance(concepts, Mapping) else dict.fromkeys(concepts, 1.0)
        erasures = self._erasures()
        if erasures is None:
            if strengths:
                raise ValueError(f"cannot erase {list(strengths)}: no bank is loaded; call load_sepme() first")
            return {}
        self._check_names(strengths, erasures)
        if bad := {
            name: s for name, s in strengths.items() if not (isinstance(s, (int, float)) and 0 < s < float("inf"))
        }:
            raise ValueError(f"a strength is a finite number above zero, not {bad}; leave a concept out to restore it")
        if left_out := [name for name in erasures.bank.always if strengths.get(name, 0) < 1]:
            raise ValueError(f"the bank's policy always erases {left_out} at full strength; include them")
        return strengths

    def _check_names(self, names: Iterable[str], erasures: Erasures) -> None:
        if unknown := [name for name in names if name not in erasures.loaded]:
            near = {name: difflib.get_close_matches(str(name), erasures.loaded, 1) for name in unknown}
            hints = "".join(f" Did you mean {match[0]!r} for {name!r}?" for name, match in near.items() if match)
            raise ValueError(f"unknown concepts {unknown}.{hints} The bank has {list(erasures.loaded)}")

    def erase(self, *concepts: str) -> None:
        """Erase these concepts as well. Raises as `set_erased` does."""
        self.set_erased({**(self._strengths()), **dict.fromkeys(concepts, 1.0)})

    def restore(self, *concepts: str) -> None:
        """Restore these concepts, exactly; every other erasure stays as it is. Raises as `set_erased` does."""
        erasures = self._erasures()
        if erasures is None:
            raise ValueError(f"cannot restore {list(concepts)}: no bank is loaded")
        self._check_names(concepts, erasures)
        self.set_erased({name: strength for name, strength in self._strengths().items() if name not in concepts})

    def _strengths(self) -> dict[str, float]:
        erasures = self._erasures()
        return erasures.active if erasures else {}

    def _erasures(self) -> Erasures | None:
        """The erasures on the UNet, refusing to go on if they were lost with a UNet that was swapped away."""
        erasures = erasures_of(self.unet)
        if erasures is None and self._sepme_bank is not None:
            raise ErasureNotInForce(
                "a bank was loaded, but the pipeline's UNet has been replaced by one without it; load the bank again"
            )
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
        """
        erasures = self._erasures()
        sets = None if erased is None else self._rows(erased, args, kwargs)
        if erasures is None:
            return super().__call__(*args, **kwargs)
        acting = sets if sets is not None else [erasures.active]
        if any(acting) and (missing := erasures.missing_from(self.unet)):
            raise ErasureNotInForce(
                f"{sorted({n for s in acting for n in s})} should be erased, but {missing} no longer pass through the "
                "increments. Undo what replaced them (unfuse_qkv_projections(), or load the bank again after changing "
                "the UNet)"
            )
        with nullcontext() if sets is None else erasures.temporarily(sets):
            return super().__call__(*args, **kwargs)

    def _rows(self, erased: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[str, float]]:
        """The erased set of each picture of a call, or one set for all of them."""
        if not isinstance(erased, (str, Mapping)):
            erased = list(erased)  # looked at more than once: a generator must not run dry and erase nothing
        if isinstance(erased, (str, Mapping)) or all(isinstance(name, str) for name in erased):
            return [self._strengths_of(erased)]
        asked = inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments
        prompt, embeds = asked.get("prompt"), asked.get("prompt_embeds")
        if isinstance(prompt, str):
            n_prompts = 1
        else:
            n_prompts = len(next((given for given in (prompt, embeds) if given is not None), ()))
        if len(erased) != n_prompts:
            raise ValueError(f"{len(erased)} erased sets for {n_prompts} prompts; give one a prompt, or one for all")
        sets = [self._strengths_of(concepts) for concepts in erased]
        return [strengths for strengths in sets for _ in range(asked.get("num_images_per_prompt") or 1)]


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
