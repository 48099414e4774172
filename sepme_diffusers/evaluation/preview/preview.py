"""The preview of a bank: each concept's prompts original, erased and restored, from the same noise, and what moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.preview.judges import Judge
from sepme_diffusers.evaluation.preview.kept import KeptPictures, base_facts, folder_for_pictures
from sepme_diffusers.evaluation.preview.outcome import MOMENTS, Preview, Row, Sheet
from sepme_diffusers.evaluation.preview.prompts import Asked, prompts_of
from sepme_diffusers.runtime.comparison import draw
from sepme_diffusers.runtime.erased_sets import Names

MOST_CONCEPTS = 8
"""How many concepts a preview shows, if none are named."""


@dataclass(frozen=True)
class Settings:
    """How the pictures of a preview are drawn.

    Args:
        prompts: How many prompts of a concept's own, how many neighbours and how many regular prompts.
        seed: Of the noise of every picture.
        steps: Denoising steps per picture.
        guidance: Of classifier-free guidance. Default: the pipeline's own.
        height: Pixels. Default: the pipeline's own.
        width: Pixels. Default: the pipeline's own.
    """

    prompts: int = 3
    seed: int = 0
    steps: int = 20
    guidance: float | None = None
    height: int | None = None
    width: int | None = None

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of a call of the pipeline."""
        given = {"guidance_scale": self.guidance, "height": self.height, "width": self.width}
        return {"num_inference_steps": self.steps} | {k: v for k, v in given.items() if v is not None}


def chosen(bank: ConceptBank, erased: Sequence[str] | None) -> tuple[str, ...]:
    """Choose the concepts of a preview: those named, or the first ones of the bank.

    Raises:
        UnknownConceptError: If the bank lacks one.
        ValueError: If the bank is empty, or one is named twice.
    """
    if not bank:
        raise ValueError("the bank has no concepts, so there is nothing to erase; make some with `sepme erase`")
    return tuple(name for _, name in Names({"bank": bank}).keys(erased)) if erased else tuple(bank)[:MOST_CONCEPTS]


def preview(
    pipe: Any,
    bank: ConceptBank,
    output: Path,
    erased: Sequence[str] | None = None,
    settings: Settings | None = None,
    judge: Judge | None = None,
    on_picture: Callable[[str, int], None] = lambda concept, total: None,
) -> Preview:
    """Draw each concept's prompts original, erased and restored. Pictures that are kept already are not drawn again.

    The original is drawn with no bank loaded; then the concept is erased, alone; then it is restored.

    Args:
        pipe: A pipeline with `load_sepme`, and no bank loaded.
        bank: The bank. What its policy always erases is restored as well here.
        output: The folder; finished pictures are kept in its folder `pictures`.
        erased: The concepts, each erased alone. Default: the first eight of the bank.
        settings: How they are drawn.
        judge: Scores the pictures of prompts that name something.
        on_picture: Called when a picture is finished: with the concept, and how many pictures there will be.

    Raises:
        ValueError: If a bank is loaded, or as `chosen` and `prompts_of`.
        OSError: If the folder cannot be written to.
    """
    settings, names = settings or Settings(), chosen(bank, erased)
    if pipe.erasable:
        raise ValueError("unload_sepme() first: the original pictures are the plain model's")
    facts = base_facts(pipe)
    kept = KeptPictures(
        folder_for_pictures(output), {**facts, "bank": bank.digest, "seed": settings.seed, **settings.call}
    )
    asked = {name: prompts_of(pipe, bank, name, settings.prompts) for name in names}
    total = len(MOMENTS) * sum(map(len, asked.values()))
    alone = {name: replace(bank.subset([name, *bank.always]), always=()) for name in names}
    sheets = []
    for name in names:
        drawer = _Drawer(pipe, alone[name], name, settings, kept, partial(on_picture, name, total))
        sheets.append(Sheet(name, tuple(Row.of(*drawn, judge) for drawn in drawer.rows(asked[name]))))
    left_out = () if erased else tuple(bank)[len(names) :]
    return Preview(tuple(sheets), left_out, _told(bank, settings, facts), judge.name if judge else "")


@dataclass(frozen=True)
class _Drawer:
    """Draws a concept's prompts at each moment, as far as they are not kept."""

    pipe: Any
    bank: ConceptBank
    concept: str
    settings: Settings
    kept: KeptPictures
    on_picture: Callable[[], None]

    def rows(self, asked: Sequence[Asked]) -> list[tuple[Asked, list[Image.Image]]]:
        """Return the pictures of each prompt, at each of `MOMENTS`."""
        original = self._column("original", asked)
        self.pipe.load_sepme(self.bank)
        try:
            self.pipe.set_erased([self.concept])
            erased = self._column("erased", asked)
            self.pipe.restore(self.concept)
            restored = self._column("restored", asked)
        finally:
            self.pipe.unload_sepme()
        pictures = zip(original, erased, restored, strict=True)
        return [(each, list(three)) for each, three in zip(asked, pictures, strict=True)]

    def _column(self, moment: str, asked: Sequence[Asked]) -> list[Image.Image]:
        return [self._picture(moment, each.prompt) for each in asked]

    def _picture(self, moment: str, prompt: str) -> Image.Image:
        # The original is the same for every concept.
        own = {"moment": moment, "prompt": prompt, "erased": [] if moment == "original" else [self.concept]}
        seeds, call = [self.settings.seed], self.settings.call
        picture = self.kept.get(own, lambda: draw(self.pipe, [prompt], None, seeds, call)[0])
        self.on_picture()
        return picture


def _told(bank: ConceptBank, settings: Settings, facts: Mapping[str, Any]) -> dict[str, str]:
    own = "the pipeline's own"
    return {
        "bank": bank.digest[:12],
        "pipeline": facts["pipeline"],
        "seed": str(settings.seed),
        "steps": str(settings.steps),
        "guidance": own if settings.guidance is None else f"{settings.guidance:g}",
        "height": str(settings.height or own),
        "width": str(settings.width or own),
        "precision": facts["dtype"].removeprefix("torch."),
        "device": facts["device"],
    }
