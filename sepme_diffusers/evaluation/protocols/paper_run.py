"""The paper's scenes on any base, as a file describes them: what is erased when, what is drawn, what was published."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.baselines.baseline import replaced
from sepme_diffusers.evaluation.measures.perceptual import perceptual_distance
from sepme_diffusers.evaluation.pictures import erased as erased_on
from sepme_diffusers.evaluation.preview.judges import Judge
from sepme_diffusers.evaluation.protocols.scene_list import SCENES, Scene
from sepme_diffusers.evaluation.report import Table
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.decouple import decouple
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.text.concept import Concept

# The paper reduces pictures to so many pixels before it compares them.
_COMPARED_AT = (64, 64)
_ERASED, _RESTORED, _REGULAR = "erased", "restored", "regular"
_FIRST_REGULAR = 6

Drawn = Mapping[str, Sequence[Image.Image]]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PaperRun:
    """A run, as its file says.

    Args:
        title: Of the report.
        concepts: c0 to c8; the last three are never erased.
        guards: Prompts that no increment may change, beside the blank prompt and the other concepts.
        scenes: Of `SCENES`; for weights that unlearn for good, the first moment of each.
        settings: What is to differ from `SepMEConfig.paper`, or from `SepMEConfig.unconstrained`.
        permanent: Change the weights for good (the paper's ‡) instead of making increments.
        prompts: A CSV file beside this one, with the columns `prompt` and `evaluation_seed`, as in the authors'
            repository. Default: each name, at the seeds 0, 1, ...
        seeds: Of each concept.
        pictures: For each seed.
        steps: Denoising steps per picture.
        guidance: Of classifier-free guidance.
        published: {scene: for each moment {measure: figure}}, for comparison.
    """

    title: str
    concepts: Annotated[tuple[str, ...], Field(min_length=9, max_length=9)]
    guards: tuple[str, ...] = ()
    scenes: tuple[Literal["1", "2", "3", "3-guarded", "3-decoupled", "4"], ...] = ("1", "2", "3", "4")
    settings: dict[str, Any] = Field(default_factory=dict)
    permanent: bool = False
    prompts: str | None = None
    seeds: PositiveInt = 50
    pictures: PositiveInt = 5
    steps: PositiveInt = 50
    guidance: NonNegativeFloat = 7.5
    published: dict[str, list[dict[str, float]]] = Field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> PaperRun:
        """Read a run from its JSON file.

        Raises:
            ValueError: Naming the file and every key that is wrong.
        """
        try:
            run = TypeAdapter(cls).validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise ValueError(f"{file} describes no run of the paper's scenes: {error}") from error
        run.config()
        return run

    def changed(
        self, seeds: int | None, pictures: int | None, scenes: Sequence[str], settings: Sequence[str]
    ) -> PaperRun:
        """Change what a caller gives; what is None or empty stays.

        Args:
            seeds: See the class.
            pictures: See the class.
            scenes: See the class.
            settings: "name=value", in place of those of the file or beside them.

        Raises:
            ValueError: If a setting or a scene is not known.
        """
        pairs = [setting.partition("=") for setting in settings]
        if wrong := [setting for setting, (_, equals, _) in zip(settings, pairs, strict=True) if not equals]:
            raise ValueError(f"settings are given as name=value, tolerance=5e-5, not as {wrong}")
        given: dict[str, Any] = {"seeds": seeds, "pictures": pictures, "scenes": tuple(scenes)}
        given = {name: value for name, value in given.items() if value}
        if pairs:
            given["settings"] = {**self.settings, **{name: _value(text) for name, _, text in pairs}}
        run = replace(self, **given)
        run.config()
        return run

    def config(self) -> SepMEConfig:
        """Give the settings of the training."""
        return (SepMEConfig.unconstrained if self.permanent else SepMEConfig.paper)(**self.settings)

    def cases(self, folder: Path) -> dict[str, list[int]]:
        """Return {concept: seeds}, by the CSV file in the folder where the run names one.

        Raises:
            ValueError: If the file is missing, or lacks a concept or a column.
        """
        if self.prompts is None:
            return {name: list(range(self.seeds)) for name in self.concepts}
        file = folder / self.prompts
        try:
            with file.open(encoding="utf-8", newline="") as lines:
                found = [(row["prompt"], int(row["evaluation_seed"])) for row in csv.DictReader(lines)]
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{file} has no columns prompt and evaluation_seed that can be read: {error}") from error
        seeds = {name: [seed for prompt, seed in found if prompt == name][: self.seeds] for name in self.concepts}
        if missing := [name for name, own in seeds.items() if not own]:
            raise ValueError(f"{file} has no prompts for {missing}; it has {sorted({prompt for prompt, _ in found})}")
        return seeds


def _value(text: str) -> Any:
    """Read a setting's value: a number, true, false or null; or text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@plain_dataclass(frozen=True)
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
        others = self.run.concepts[_FIRST_REGULAR:] if scene.guarded else ()
        trainer = SepMETrainer(self.pipe, self.run.config(), self.run.guards, others=others)
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
        return self._measured(now, earlier, erased_on(self.pipe, bank, now))

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
                figures |= {f"{group} {what}": value for what, value in self._figures(drawn, names).items()}
        return Moment(now, figures)

    def _figures(self, drawn: Drawn, names: Sequence[str]) -> dict[str, float]:
        pictures, originals = ([p for name in names for p in of[name]] for of in (drawn, self.original))
        truth = [name for name in names for _ in drawn[name]]
        small, others = ([p.resize(_COMPARED_AT) for p in some] for some in (pictures, originals))
        equal = sum(a.tobytes() == b.tobytes() for a, b in zip(pictures, originals, strict=True))
        return {
            "ACC %": self._accuracy(pictures, truth),
            "original ACC %": self._accuracy(originals, truth),
            "distance": perceptual_distance(small, others),
            "equal to the bit %": 100 * equal / len(pictures),
        }

    def _accuracy(self, pictures: Sequence[Image.Image], truth: Sequence[str]) -> float:
        shown = self.judge.likeliest(pictures, self.run.concepts)
        return 100 * sum(a == b for a, b in zip(shown, truth, strict=True)) / len(truth)

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
