"""Judges tell how likely it is that pictures show what their prompts name: CLIP, zero-shot, and the built-in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import AutoConfig, CLIPModel, CLIPProcessor

from sepme_diffusers import pocket
from sepme_diffusers.pocket.vocabulary import OBJECTS, STYLES
from sepme_diffusers.text.spelling import mentions

BUILT_IN = "pocket"
"""The name of the built-in judge."""
# What a picture of the blank prompt is called: CLIP reads nothing in no text.
_ANYTHING = "a picture"
# How many pictures CLIP looks at together.
_AT_A_TIME = 32


class Judge(Protocol):
    """Tells how likely it is that pictures show what their prompts name.

    Attributes:
        name: What a report calls it.
    """

    @property
    def name(self) -> str: ...

    def __call__(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], withouts: Sequence[str]
    ) -> list[float]:
        """Return a probability for each picture; nan where the judge cannot tell.

        Args:
            pictures: The pictures.
            prompts: For each, the prompt that names what it should show.
            withouts: For each, the same prompt without that.
        """
        ...

    def likeliest(self, pictures: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        """Return for each picture which of the names it shows.

        Raises:
            ValueError: If the judge does not know a name.
        """
        ...


@dataclass(frozen=True, eq=False)
class ClipJudge:
    """A zero-shot judge: which of two texts, the prompt and the prompt without, CLIP finds nearer to a picture.

    Args:
        name: Its folder or Hub id.
        model: The CLIP model.
        processor: Its processor.

    Source: arXiv 2103.00020 (zero-shot classification).
    """

    name: str
    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str) -> ClipJudge:
        """Load a CLIP model with its processor.

        Args:
            name: Folder or Hub id.

        Raises:
            ValueError: If there is none.
        """
        advice = f"a judge is the folder or Hub id of a CLIP model with its processor, or {BUILT_IN!r}"
        try:
            kind = AutoConfig.from_pretrained(name).model_type
            if kind == "clip":
                return cls(name, CLIPModel.from_pretrained(name).eval(), CLIPProcessor.from_pretrained(name))
        except (OSError, ValueError) as error:
            raise ValueError(f"there is no judge {name!r}; {advice}") from error
        raise ValueError(f"{name!r} is a model of type {kind!r}; {advice}")

    @torch.no_grad()
    def __call__(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], withouts: Sequence[str]
    ) -> list[float]:
        """Return softmax(logits of the prompt and of the prompt without)[0] for each picture, see `Judge`."""
        texts = [text or _ANYTHING for pair in zip(prompts, withouts, strict=True) for text in pair]
        inputs = self.processor(text=texts, images=list(pictures), return_tensors="pt", padding=True, truncation=True)
        logits = self.model(**inputs).logits_per_image
        pairs = torch.stack([logits[i, 2 * i : 2 * i + 2] for i in range(len(logits))])
        return pairs.softmax(dim=1)[:, 0].tolist()

    @torch.no_grad()
    def likeliest(self, pictures: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        """Return the name that CLIP finds nearest to each picture, see `Judge`."""
        nearest: list[int] = []
        for start in range(0, len(pictures), _AT_A_TIME):
            part = list(pictures[start : start + _AT_A_TIME])
            inputs = self.processor(text=list(names), images=part, return_tensors="pt", padding=True, truncation=True)
            nearest += self.model(**inputs).logits_per_image.argmax(dim=1).tolist()
        return [names[index] for index in nearest]


@dataclass(frozen=True)
class PocketJudge:
    """The built-in model's judge: the probability of the style or object that the prompt without does not name."""

    name: str = "the built-in judge"

    def __call__(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], withouts: Sequence[str]
    ) -> list[float]:
        """Return the probability of a class for each picture of 64 x 64, see `Judge`."""
        style, object_ = pocket.classify(pictures)
        scores = []
        for index, (prompt, without) in enumerate(zip(prompts, withouts, strict=True)):
            if (found := _named(STYLES, prompt, without)) is not None:
                scores.append(float(style[index, pocket.style_classes.index(found)]))
            elif (found := _named(OBJECTS, prompt, without)) is not None:
                scores.append(float(object_[index, pocket.objects.index(found)]))
            else:
                scores.append(float("nan"))
        return scores

    def likeliest(self, pictures: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        """Return the likeliest of all classes of the names' kind, styles or objects, see `Judge`."""
        known = {"style": pocket.style_classes, "object": pocket.objects}
        kind = next((kind for kind, classes in known.items() if set(names) <= set(classes)), None)
        if kind is None:
            raise ValueError(f"the built-in judge knows styles {pocket.style_classes}, and objects; not {list(names)}")
        probabilities = pocket.classify(pictures)[kind == "object"]
        return [known[kind][index] for index in probabilities.argmax(dim=1).tolist()]


def find_judge(name: str) -> Judge:
    """Return a judge.

    Args:
        name: "pocket" for the built-in one, or the folder or Hub id of a CLIP model.

    Raises:
        ValueError: If there is none.
    """
    return PocketJudge() if name == BUILT_IN and not Path(name).is_dir() else ClipJudge.load(name)


def _named(classes: dict[str, str | None], prompt: str, without: str) -> str | None:
    """Find the class that a prompt names, by its name or its second name, and the other prompt does not."""
    names = {name: [name, *([second] if second else [])] for name, second in classes.items()}
    return next((name for name, own in names.items() if mentions(prompt, own) and not mentions(without, own)), None)
