"""The concepts of the built-in banks, and the regular prompts that their increments should leave alone."""

from __future__ import annotations

from collections.abc import Sequence

from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.text.concept import BLANK, Concept

# Increments see these objects only; they are judged on the rest.
EDIT_OBJECTS: tuple[str, ...] = tuple(words.OBJECTS)[::2]
TEST_OBJECTS: tuple[str, ...] = tuple(words.OBJECTS)[1::2]
GUARDS: tuple[str, ...] = (BLANK, words.WATERMARK)
BANKED_STYLES: tuple[str, ...] = tuple(name for name in words.STYLES if name not in words.UNBANKED_STYLES)
BANKED_OBJECTS: tuple[str, ...] = tuple(name for name in words.OBJECTS if name not in words.UNBANKED_OBJECTS)


def style_concept(style: str, anchors: Sequence[str] = ()) -> Concept:
    """Describe a style, paired over the edit objects and the training templates with the same prompt without it.

    Args:
        style: Its name.
        anchors: Styles whose mean, in the same prompt, the closed form maps it to. Default: the prompt without it.
    """
    cases = [(template, object_) for template in words.PAIR_TEMPLATES for object_ in EDIT_OBJECTS]
    return Concept(
        style,
        tuple((template.format(style=style, object=object_), f"a {object_}") for template, object_ in cases),
        tuple(tuple(t.format(style=other, object=object_) for other in anchors) for t, object_ in cases if anchors),
    )


def object_concept(object_: str) -> Concept:
    """Describe an object, plain and in each banked style, mapped to the mean of five others in the same prompt."""
    others = [name for name in BANKED_OBJECTS if name != object_][:: len(BANKED_OBJECTS) // 5]
    templates = dict.fromkeys(words.OBJECT_TEMPLATES, BLANK) | {
        words.PAIR_TEMPLATES[turn % len(words.PAIR_TEMPLATES)].replace("{style}", style): f"{style} style"
        for turn, style in enumerate(BANKED_STYLES)
    }
    return Concept(
        object_,
        tuple((template.format(object=object_), without) for template, without in templates.items()),
        tuple(tuple(template.format(object=other) for other in others) for template in templates),
    )


def regular_for_styles(erased: str) -> tuple[str, ...]:
    """List prompts that erasing a style should leave alone: plain objects, and the other banked styles."""
    return _plain_and_styled(EDIT_OBJECTS, erased)


def regular_for_anything() -> tuple[str, ...]:
    """List every banked object, plain and in each banked style in changing words: the shipped soft guards."""
    return _plain_and_styled(BANKED_OBJECTS)


def regular_prompts(object_: str) -> tuple[str, ...]:
    """List prompts for an object, plain and in every banked style: regular wherever another object is erased."""
    plain = [template.format(object=object_) for template in words.OBJECT_TEMPLATES]
    styled = [t.format(style=style, object=object_) for t in words.PAIR_TEMPLATES for style in BANKED_STYLES]
    return (*plain, *styled)


def _plain_and_styled(objects: Sequence[str], erased: str = "") -> tuple[str, ...]:
    """Prompts for objects, plain and in each banked style but the erased one, in changing words."""
    plain = [template.format(object=object_) for template in words.OBJECT_TEMPLATES for object_ in objects]
    styled = [
        words.PAIR_TEMPLATES[(index + turn) % len(words.PAIR_TEMPLATES)].format(style=style, object=object_)
        for turn, style in enumerate(BANKED_STYLES)
        if style != erased
        for index, object_ in enumerate(objects)
    ]
    return (*plain, *styled)
