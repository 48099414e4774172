"""The demonstration: erase six styles of the built-in model, restore two, restore all, and measure each moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.measures.accuracy import judged, style_accuracy
from sepme_diffusers.evaluation.pictures import built_in, generate
from sepme_diffusers.evaluation.probes import Probe
from sepme_diffusers.evaluation.protocols.erasures import GUARDS, erase_names
from sepme_diffusers.evaluation.report import Table
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.runtime.changes import largest_change, mean_change
from sepme_diffusers.runtime.contact_sheet import contact_sheet

ERASED = ("woodcut", "neon", "halftone", "blueprint", "mosaic", "pencil")
RESTORED = ERASED[:2]
KEPT = ("stencil", "pixel", "watercolour", "thermal")
NEVER_SEEN = words.UNBANKED_STYLES
# What is erased at each moment.
MOMENTS: dict[str, tuple[str, ...]] = {
    "original": (),
    "six erased": ERASED,
    "two restored": ERASED[2:],
    "all restored": (),
}


def probes(n_objects: int) -> dict[str, Probe]:
    """Write prompts by kind, in held-out templates and with objects that no edit used."""
    erased = _styled(ERASED, n_objects)
    regular = _styled((*KEPT, *NEVER_SEEN), n_objects)
    plain = tuple(words.TEST_OBJECTS[: 2 * n_objects])
    return {
        "erased": erased,
        "regular": Probe(
            (*regular.prompts, *(f"a {name}" for name in plain)),
            (*regular.styles, *(words.PLAIN,) * len(plain)),
            (*regular.objects, *plain),
        ),
        "guarded": Probe((*GUARDS, *KEPT)),
        "names": Probe(RESTORED),
    }


def _styled(styles: tuple[str, ...], n_objects: int) -> Probe:
    # A different stretch of objects for each style, so that the sample covers many.
    cases = [
        (template, style, words.TEST_OBJECTS[(5 * index + step) % len(words.TEST_OBJECTS)])
        for index, style in enumerate(styles)
        for step in range(n_objects)
        for template in words.HELD_OUT_TEMPLATES
    ]
    prompts = tuple(template.format(style=style, object=object_) for template, style, object_ in cases)
    return Probe(prompts, tuple(style for _, style, _ in cases), tuple(object_ for *_, object_ in cases))


@dataclass(frozen=True)
class Outcome:
    """What the demonstration gives: a grid, tables, figures by name, the bank that it made, and how long that took."""

    grid: Image.Image
    tables: tuple[Table, ...]
    figures: dict[str, float]
    bank: ConceptBank
    seconds: float


def run(
    seed: int = 0,
    n_objects: int = 6,
    on_moment: Callable[[str], None] | None = None,
) -> Outcome:
    """Erase, compose and restore on the built-in model.

    Args:
        seed: Of the pictures.
        n_objects: Objects for each style, two pictures each.
        on_moment: Called before the pictures of each moment are drawn.
    """
    pipe = built_in()
    started = time.perf_counter()
    bank = erase_names(pipe, "styles", ERASED, others=KEPT)
    seconds = time.perf_counter() - started
    asked, pictures = probes(n_objects), {}
    for moment, erased in MOMENTS.items():
        if on_moment is not None:
            on_moment(moment)
        if erased and pipe.get_bank() is None:
            pipe.load_sepme(bank)
        pipe.set_erased(erased)
        pictures[moment] = {kind: generate(pipe, probe.prompts, seed) for kind, probe in asked.items()}
    figures = measure(pictures, asked)
    return Outcome(grid(pictures, asked), (table(figures),), figures, bank, seconds)


def measure(pictures: dict[str, dict[str, list[Image.Image]]], asked: dict[str, Probe]) -> dict[str, float]:
    """Measure accuracies in percent and largest changes in 255ths, keyed "what, moment"."""
    figures: dict[str, float] = {}
    original = pictures["original"]
    for moment, erased in MOMENTS.items():
        drawn = pictures[moment]
        groups = {
            "regular": _select(drawn["regular"], asked["regular"], asked["regular"].styles),
            "erased": _select(drawn["erased"], asked["erased"], ERASED if moment == "original" else erased),
            "restored": _select(drawn["erased"], asked["erased"], _restored(moment)),
        }
        for group, (some, styles, objects) in groups.items():
            if some:
                accuracies = judged(some, styles, objects)
                figures[f"{group} style ACC, {moment}"], figures[f"{group} object ACC, {moment}"] = accuracies
        figures[f"guarded style ACC, {moment}"] = style_accuracy(drawn["guarded"][len(GUARDS) :], KEPT)
        figures[f"guarded change, {moment}"] = largest_change(drawn["guarded"], original["guarded"])
        if back := _restored(moment):
            pairs = (_select(kinds["erased"], asked["erased"], back)[0] for kinds in (drawn, original))
            figures[f"restored mean change, {moment}"] = mean_change(*pairs)
    figures["restored change, two restored"] = largest_change(pictures["two restored"]["names"], original["names"])
    figures["restored change, all restored"] = max(
        largest_change(pictures["all restored"][kind], original[kind]) for kind in asked
    )
    return figures


def _restored(moment: str) -> tuple[str, ...]:
    return {"two restored": RESTORED, "all restored": ERASED}.get(moment, ())


def _select(
    pictures: list[Image.Image], probe: Probe, styles: tuple[str, ...]
) -> tuple[list[Image.Image], list[str], list[str]]:
    """Pick the pictures of some styles, with what they should show."""
    chosen = [index for index, style in enumerate(probe.styles) if style in styles]
    return [pictures[i] for i in chosen], [probe.styles[i] for i in chosen], [probe.objects[i] for i in chosen]


def table(figures: dict[str, float]) -> Table:
    """Tabulate the figures as the demonstration prints them."""

    def row(label: str, key: str, digits: int) -> tuple[str, ...]:
        cells = (figures.get(f"{key}, {moment}") for moment in MOMENTS)
        return (label, *("" if cell is None else f"{cell:.{digits}f}" for cell in cells))

    rows = [
        row(f"{group}: {what} ACC %", f"{group} {what} ACC", 1)
        for group in ("erased", "restored", "regular")
        for what in ("style", "object")
    ]
    rows.append(row("guarded: style ACC %", "guarded style ACC", 1))
    rows.append(row("guarded: max, /255", "guarded change", 0))
    rows.append(row("restored: max, /255", "restored change", 0))
    rows.append(row("restored: mean, /255", "restored mean change", 1))
    return Table("ACC by the built-in judge; change of a pixel against the original", ("", *MOMENTS), tuple(rows))


def grid(pictures: dict[str, dict[str, list[Image.Image]]], asked: dict[str, Probe]) -> Image.Image:
    """Lay out one row per prompt and one column per moment: erased styles, guarded prompts, then never-seen ones."""
    erased, regular = asked["erased"], asked["regular"]
    chosen = [("erased", erased.styles.index(style)) for style in ERASED]
    chosen += [("guarded", index) for index in range(1, 1 + 1 + len(KEPT))]
    chosen += [("regular", regular.styles.index(style)) for style in (*NEVER_SEEN, words.PLAIN)]
    labels = [
        f"{kind if kind != 'regular' else 'never seen'}:\n{asked[kind].prompts[index]}" for kind, index in chosen
    ]
    rows = [[pictures[moment][kind][index] for moment in MOMENTS] for kind, index in chosen]
    return contact_sheet(rows, labels, list(MOMENTS), scale=2)
