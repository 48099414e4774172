"""Plays a run of the paper's scenes on any base, and tabulates it beside what was published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from PIL import Image

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.baselines.baseline import replaced
from sepme_diffusers.evaluation.measures.perceptual import perceptual_distance
from sepme_diffusers.evaluation.pictures import erased
from sepme_diffusers.evaluation.preview.judges import Judge
from sepme_diffusers.evaluation.protocols.paper_run import PaperRun
from sepme_diffusers.evaluation.protocols.scene_list import SCENES, Scene
from sepme_diffusers.evaluation.report import Table
from sepme_diffusers.making.decouple import decouple
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.text.concept import Concept

# The paper reduces pictures to so many pixels before it compares them.
_COMPARED_AT = (64, 64)
_ERASED, _RESTORED, _REGULAR = "erased", "restored", "regular"
_FIRST_REGULAR = 6


@dataclass(frozen=True)
class Moment:
    """What is erased at a moment, and {"erased ACC %" and so on: figure}, with the original's accuracies."""

    erased: tuple[str, ...]
    figures: Mapping[str, float]


class PaperRunner:
    """Plays a run's scenes on a pipeline.

    Args:
        pipe: The base, with nothing loaded.
        run: What to play.
        cases: {concept: seeds}.
        judge: Tells which of the concepts a picture shows.
        on_moment: Called with what is done now.
    """

    def __init__(
        self,
        pipe: Any,
        run: PaperRun,
        cases: Mapping[str, Sequence[int]],
        judge: Judge,
        on_moment: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.pipe, self.run, self.cases, self.judge, self.on_moment = pipe, run, cases, judge, on_moment
        on_moment("drawing with the original")
        self.original = self._draw()

    def play(self, name: str) -> list[Moment]:
        """Play a scene of `SCENES`, and measure each of its moments but the last, at which nothing is erased."""
        scene = SCENES[name]
        sets = [tuple(self.run.concepts[index] for index in indexes) for indexes in scene.erased if indexes]
        if self.run.permanent:
            return [self._permanent(sets[0])]
        return [self._moment(bank, now, earlier) for bank, now, earlier in self._banks(scene, sets)]

    def _banks(
        self, scene: Scene, sets: Sequence[tuple[str, ...]]
    ) -> Iterator[tuple[ConceptBank, tuple[str, ...], set[str]]]:
        """Give each moment's bank, what is erased, and what has been erased before."""
        trainer = SepMETrainer(self.pipe, self.run.config(), self.run.guards)
        bank, earlier = ConceptBank(trainer.base()), set[str]()
        for now in sets:
            wanted = now if scene.joining else self.run.concepts[:_FIRST_REGULAR]
            if joining := [name for name in wanted if name not in bank]:
                self.on_moment(f"training {', '.join(joining)}")
                bank = trainer.erase([Concept.paper(name) for name in joining], bank)
                bank = decouple(bank, self.pipe) if scene.decoupled else bank
            yield bank, now, set(earlier)
            earlier |= set(now)

    def _moment(self, bank: ConceptBank, now: tuple[str, ...], earlier: set[str]) -> Moment:
        return self._measured(now, earlier, erased(self.pipe, bank, now))

    def _permanent(self, now: tuple[str, ...]) -> Moment:
        self.on_moment(f"unlearning {', '.join(now)} for good")
        trainer = SepMETrainer(self.pipe, self.run.config())
        changed = trainer.erase_permanently([Concept.paper(name) for name in now])
        return self._measured(now, set(), replaced(self.pipe.unet, changed))

    def _measured(self, now: tuple[str, ...], earlier: set[str], in_force: AbstractContextManager[Any]) -> Moment:
        self.on_moment(f"{', '.join(now)} erased")
        with in_force:
            drawn = self._draw()
        groups = {
            _ERASED: now,
            _RESTORED: [name for name in self.run.concepts if name in earlier and name not in now],
            _REGULAR: self.run.concepts[_FIRST_REGULAR:],
        }
        figures: dict[str, float] = {}
        for group, names in groups.items():
            if names:
                each = [self._figures(name, drawn[name]) for name in names]
                figures |= {f"{group} {what}": mean(own[what] for own in each) for what in each[0]}
        return Moment(now, figures)

    def _figures(self, name: str, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """Measure a concept's pictures, which are few enough to be judged together."""
        originals = self.original[name]
        small, others = ([picture.resize(_COMPARED_AT) for picture in some] for some in (pictures, originals))
        equal = mean(a.tobytes() == b.tobytes() for a, b in zip(pictures, originals, strict=True))
        return {
            "ACC %": self._accuracy(pictures, name),
            "original ACC %": self._accuracy(originals, name),
            "distance": perceptual_distance(small, others),
            "equal to the bit %": 100 * equal,
        }

    def _accuracy(self, pictures: Sequence[Image.Image], name: str) -> float:
        return 100 * mean(shown == name for shown in self.judge.likeliest(pictures, self.run.concepts))

    def _draw(self) -> dict[str, list[Image.Image]]:
        """Draw every concept's pictures with what is in force now."""
        return {
            name: [picture for seed in seeds for picture in self._pictures(name, seed)]
            for name, seeds in self.cases.items()
        }

    def _pictures(self, name: str, seed: int) -> Sequence[Image.Image]:
        run = self.run
        return self.pipe(
            name,
            num_images_per_prompt=run.pictures,
            num_inference_steps=run.steps,
            guidance_scale=run.guidance,
            generator=torch.Generator().manual_seed(seed),
        ).images


def table(run: PaperRun, scene: str, moments: Sequence[Moment]) -> Table:
    """Tabulate a scene: a row for each measure, a column for each moment, what was published in brackets."""
    published = run.published.get(scene, [])

    def cell(index: int, measure: str) -> str:
        value = moments[index].figures.get(measure)
        if value is None:
            return ""
        said = published[index].get(measure) if index < len(published) else None
        digits = 3 if measure.endswith("distance") else 1
        return f"{value:.{digits}f}" + ("" if said is None else f" [{said:.{digits}f}]")

    measures = list(dict.fromkeys(measure for moment in moments for measure in moment.figures))
    rows = tuple((measure, *(cell(index, measure) for index in range(len(moments)))) for measure in measures)
    columns = ("", *(", ".join(moment.erased) for moment in moments))
    return Table(f"{run.title}, scene {scene}; published figures in brackets", columns, rows)
