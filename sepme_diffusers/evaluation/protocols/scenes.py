"""The paper's four scenes on the built-in model: concepts are erased, restored and joined over time, and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from PIL import Image

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.measures.accuracy import judged
from sepme_diffusers.evaluation.measures.frechet import frechet_distance
from sepme_diffusers.evaluation.measures.judge_features import pooled_features
from sepme_diffusers.evaluation.measures.perceptual import perceptual_distance
from sepme_diffusers.evaluation.pictures import PictureCache, built_in, generate
from sepme_diffusers.evaluation.probes import PARAPHRASES, Kind, Probe, plain_probe, probe
from sepme_diffusers.evaluation.protocols.erasures import GUARDS, erase_names
from sepme_diffusers.evaluation.protocols.scene_list import SCENES, Scene
from sepme_diffusers.making.decouple import decouple
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.runtime.changes import largest_change
from sepme_diffusers.runtime.pipeline import SepMEPipeline

# Six to erase, all but mosaic with a second name; then three regular ones.
CONCEPTS: dict[Kind, tuple[str, ...]] = {
    "styles": ("woodcut", "neon", "blueprint", "pencil", "pixel", "mosaic", "stencil", "watercolour", "halftone"),
    "objects": ("cat", "frog", "donut", "car", "umbrella", "airplane", "rabbit", "castle", "sunflower"),
}
REGULAR = slice(6, 9)
NEVER_SEEN: dict[Kind, tuple[str, ...]] = {"styles": words.UNBANKED_STYLES, "objects": words.UNBANKED_OBJECTS}
_UNSEEN_CELLS = 2
_FEW_STEPS = 5
# Pictures for the bars, per picture of a moment.
BAR_PICTURES = 4
ERASED, RESTORED, PENDING = "erased", "restored", "not yet erased"
GUARDED, UNGUARDED = "regular, guarded", "regular, not guarded"
SECOND_NAME, PARAPHRASED = "erased, by its second name", "erased, paraphrased"
UNSEEN, PLAIN = "regular, never seen", "regular, plain objects"
GROUPS = (ERASED, RESTORED, PENDING, GUARDED, UNGUARDED, UNSEEN, PLAIN, SECOND_NAME, PARAPHRASED)


@dataclass(frozen=True)
class Cell:
    """Prompts for one concept, or for others of one role; all cells of a role have equally many pictures."""

    concept: str
    role: str
    probe: Probe


def cells(kind: Kind, n: int, seed: int) -> list[Cell]:
    """List what is drawn at every moment, with n pictures per cell (half as many where it has other words).

    Args:
        kind: Of what is erased.
        n: Pictures per cell; those of a smaller n are the first ones.
        seed: Where the seeds begin; each cell has a range of its own.
    """
    own = {"styles": words.STYLES, "objects": words.OBJECTS}[kind]
    starts = iter(range(seed, seed + 10**6, 1000))
    drawn = [Cell(name, "", probe(kind, name, n, next(starts))) for name in CONCEPTS[kind]]
    for index in range(_UNSEEN_CELLS):
        names = NEVER_SEEN[kind][index::_UNSEEN_CELLS]
        parts = [probe(kind, name, -(-n // len(names)), next(starts)) for name in names]
        drawn.append(Cell(" ".join(names), UNSEEN, _in_turn(parts, n)))
    if kind == "styles":
        drawn.append(Cell(words.PLAIN, PLAIN, plain_probe(n, next(starts))))
    half = -(-n // 2)
    for name in CONCEPTS[kind][: REGULAR.start]:
        if second := own[name]:
            drawn.append(Cell(name, SECOND_NAME, probe(kind, name, half, next(starts), word=second)))
        drawn.append(Cell(name, PARAPHRASED, probe(kind, name, half, next(starts), PARAPHRASES)))
    return drawn


def _in_turn(parts: Sequence[Probe], n: int) -> Probe:
    """Take the first n cases of probes of one length, in turn."""
    cases = [zip(part.prompts, part.styles, part.objects, part.seeds, strict=True) for part in parts]
    turns = [case for turn in zip(*cases, strict=True) for case in turn][:n]
    return Probe(*zip(*turns, strict=True))


def group(
    cell: Cell, erased: Sequence[str], earlier: Iterable[str], regular: Sequence[str], guarded: bool = True
) -> str | None:
    """Tell what a cell shows at a moment; None if it is not drawn then (other words for what is not erased).

    Args:
        cell: The cell.
        erased: What is erased now.
        earlier: What was erased at any earlier moment.
        regular: What never is.
        guarded: Whether the increments guard the names of the regular ones.
    """
    if cell.role in (SECOND_NAME, PARAPHRASED):
        return cell.role if cell.concept in erased else None
    if cell.role:
        return cell.role
    if cell.concept in erased:
        return ERASED
    if cell.concept in regular:
        return GUARDED if guarded else UNGUARDED
    return RESTORED if cell.concept in set(earlier) else PENDING


@dataclass(frozen=True)
class Figures:
    """What was measured on a group, beside the same on the original model's pictures.

    Args:
        pictures: How many.
        acc: Of the kind that is erased (style or object), percent, and `original_acc`.
        kept: Of the other one (object or style), percent, and `original_kept`.
        distance: Mean perceptual distance, see `measures.perceptual`.
        fid: Mean over the cells of the Fréchet distance, each of the pictures of one cell; None for other words, which
            have fewer.
    """

    pictures: int
    acc: float
    kept: float
    original_acc: float
    original_kept: float
    distance: float
    fid: float | None


@dataclass(frozen=True)
class Exactness:
    """What must hold to the bit, on pictures drawn in one batch of the same shape each time.

    Args:
        guards: Largest change of the blank prompt and the watermark, /255.
        names: Largest change of each concept name that every active increment guards, /255.
        alone: Whether all pictures equal those of a pipeline that holds the erased concepts and nothing else.
    """

    guards: int
    names: dict[str, int]
    alone: bool


@dataclass(frozen=True)
class Moment:
    """One moment of a scene: what is erased, the figures by group, what is exact, and one picture per cell."""

    erased: tuple[str, ...]
    figures: dict[str, Figures]
    exact: Exactness
    pictures: dict[str, Image.Image]


class SceneRunner:
    """Plays the scenes of one kind of concept, which share pipelines, pictures and increments.

    Args:
        kind: Styles or objects.
        seed: Of the pictures.
        pictures: Of each concept at each moment.
        steps: Denoising steps per picture.
        gates: Erase with gates, or as adapters do, which have none.
    """

    def __init__(self, kind: Kind, seed: int, pictures: int, steps: int = 20, gates: bool = True) -> None:
        self.kind, self.seed, self.pictures, self.gates = kind, seed, pictures, gates
        self.concepts = CONCEPTS[kind]
        # The second one never holds anything but what is erased.
        self.pipe, self.other = built_in(), built_in()
        self.cache = PictureCache(self.pipe, steps)
        self.cells = cells(kind, pictures, seed)
        held_out = [cell.probe.prompts[0] for cell in self.cells[:5]]
        self._exact_prompts = (*self.concepts, *held_out)
        self._exact_original = self._exact_pictures(self.pipe)

    @cached_property
    def at_once(self) -> ConceptBank:
        """A bank of all six, made at once."""
        return self._erase(self.concepts[: REGULAR.start], None, SCENES["1"])

    def _erase(self, names: Sequence[str], bank: ConceptBank | None, scene: Scene) -> ConceptBank:
        self.pipe.unload_sepme()
        guarded = self.concepts[REGULAR] if scene.guarded else ()
        made = erase_names(self.pipe, self.kind, names, bank, guarded, self.gates)
        return decouple(made, self.pipe) if scene.decoupled else made

    def play(self, name: str, on_moment: Callable[[str], None] | None = None) -> list[Moment]:
        """Play a scene and measure each moment.

        Args:
            name: One of `SCENES`.
            on_moment: Called with what is erased before each.
        """
        scene = SCENES[name]
        bank: ConceptBank | None = None
        earlier: list[str] = []
        moments: list[Moment] = []
        for indexes in scene.erased:
            erased = tuple(self.concepts[index] for index in indexes)
            if on_moment is not None:
                on_moment(", ".join(erased) or "nothing")
            if not scene.joining:
                bank = self.at_once
            elif joining := [concept for concept in erased if bank is None or concept not in bank]:
                bank = self._erase(joining, bank, scene)
            # Every scene begins with something erased, so by now there is a bank.
            moments.append(self.moment(cast(ConceptBank, bank), erased, earlier, scene.guarded))
            earlier += erased
        return moments

    def moment(
        self, bank: ConceptBank, erased: tuple[str, ...], earlier: Sequence[str], guarded: bool = True
    ) -> Moment:
        """Draw and measure a moment: a bank with these concepts erased."""
        figures, pictures = self.measure(self.cells, bank, erased, earlier, guarded)
        return Moment(erased, figures, self.exactness(bank, erased), pictures)

    def measure(
        self,
        asked: Sequence[Cell],
        bank: ConceptBank,
        erased: tuple[str, ...],
        earlier: Sequence[str] = (),
        guarded: bool = True,
    ) -> tuple[dict[str, Figures], dict[str, Image.Image]]:
        """Measure by group; also the first picture of each cell that shows a concept under its own name."""
        shown_as = [(cell, group(cell, erased, earlier, self.concepts[REGULAR], guarded)) for cell in asked]
        grouped = [(cell, where) for cell, where in shown_as if where is not None]
        self._set(self.pipe, bank, ())
        originals = self.cache.draw([cell.probe for cell, _ in grouped])
        self._set(self.pipe, bank, erased)
        drawn = self.cache.draw([cell.probe for cell, _ in grouped])
        parts: dict[str, list[Figures]] = {}
        for (cell, where), now, before in zip(grouped, drawn, originals, strict=True):
            parts.setdefault(where, []).append(self._figures(cell, now, before))
        shown = {cell.concept: now[0] for (cell, _), now in zip(grouped, drawn, strict=True) if _own(cell)}
        return {where: _mean(parts[where]) for where in GROUPS if where in parts}, shown

    def _figures(self, cell: Cell, now: list[Image.Image], before: list[Image.Image]) -> Figures:
        probe = cell.probe
        accuracies = [judged(pictures, probe.styles, probe.objects) for pictures in (now, before)]
        (acc, kept), (original_acc, original_kept) = (a if self.kind == "styles" else a[::-1] for a in accuracies)
        fid = frechet_distance(pooled_features(now), pooled_features(before)) if _own(cell) else None
        distance = perceptual_distance(now, before)
        return Figures(len(now), acc, kept, original_acc, original_kept, distance, fid)

    def exactness(self, bank: ConceptBank, erased: tuple[str, ...]) -> Exactness:
        """Compare with the original, and with a pipeline that never held the other concepts."""
        self._set(self.pipe, bank, erased)
        here = self._exact_pictures(self.pipe)
        self._set(self.other, bank.subset(erased), erased)
        alone = largest_change(here, self._exact_pictures(self.other)) == 0
        changes = [largest_change([now], [before]) for now, before in zip(here, self._exact_original, strict=True)]
        names = dict(zip(self.concepts, changes[len(GUARDS) :], strict=False))
        guarded = {name: names[name] for name in names if all(name in bank[other].guards for other in erased)}
        return Exactness(max(changes[: len(GUARDS)]), guarded, alone)

    def _exact_pictures(self, pipe: SepMEPipeline) -> list[Image.Image]:
        """Blank prompt and watermark as a user would draw them; others in a few steps, which show any bit."""
        guards = generate(pipe, GUARDS, self.seed + 10**6, self.cache.steps)
        return guards + generate(pipe, self._exact_prompts, self.seed + 10**6, min(_FEW_STEPS, self.cache.steps))

    def _set(self, pipe: SepMEPipeline, bank: ConceptBank, erased: Sequence[str]) -> None:
        if pipe.get_bank() is not bank:
            pipe.unload_sepme()
            if bank:
                pipe.load_sepme(bank)
        if bank:
            pipe.set_erased(erased)

    def originals(self) -> dict[str, Image.Image]:
        """Draw one picture per cell with the original model."""
        own = [cell for cell in self.cells if _own(cell)]
        self.pipe.unload_sepme()
        return {
            cell.concept: drawn[0] for cell, drawn in zip(own, self.cache.draw([c.probe for c in own]), strict=True)
        }

    def six_erased(self) -> Moment:
        """Measure six erased at once, on `BAR_PICTURES` times as many pictures."""
        erased, many = self.concepts[: REGULAR.start], cells(self.kind, BAR_PICTURES * self.pictures, self.seed)
        figures, pictures = self.measure(many, self.at_once, erased)
        return Moment(erased, figures, self.exactness(self.at_once, erased), pictures)


def _own(cell: Cell) -> bool:
    return cell.role not in (SECOND_NAME, PARAPHRASED)


def _mean(parts: Sequence[Figures]) -> Figures:
    """Figures of cells of one size, averaged."""
    values = [[part.acc, part.kept, part.original_acc, part.original_kept, part.distance] for part in parts]
    acc, kept, original_acc, original_kept, distance = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
    fids = [part.fid for part in parts if part.fid is not None]
    n, fid = sum(part.pictures for part in parts), sum(fids) / len(fids) if fids else None
    return Figures(n, acc, kept, original_acc, original_kept, distance, fid)
