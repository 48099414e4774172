"""The pipelines that load concept banks and erase any subset of them."""

from __future__ import annotations

from functools import cache
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from sepme_diffusers.doors.registry import denoisers_of
from sepme_diffusers.runtime.loader_mixin import SepMELoaderMixin


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
    """The class of an attached pipeline. It is pickled by the plain class: it is made when it is first needed."""
    body = {"__module__": plain.__module__, "__reduce__": lambda pipe: (_new_attached, (plain,), pipe.__dict__)}
    return type(plain.__name__, (SepMELoaderMixin, plain), body)


def _new_attached(plain: type) -> Any:
    return object.__new__(_attached_class(plain))


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
    pipe.__class__ = _attached_class(type(pipe))  # type: ignore[arg-type]
    return pipe
