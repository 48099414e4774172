"""A run of the paper's scenes, as its file says: which concepts, what is drawn, which settings, what was published."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sepme_diffusers.increment.config import SepMEConfig


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PaperRun:
    """A run, as its file says.

    Args:
        title: Of the report.
        concepts: c0 to c8; the last three are never erased, and as in the paper nothing guards them.
        guards: Prompts that no increment may change, beside the blank prompt and the names of c0 to c5.
        scenes: Of `scene_list.SCENES`; for weights that unlearn for good, the first moment of each.
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
    scenes: tuple[Literal["1", "2", "3", "3-decoupled", "4"], ...] = ("1", "2", "3", "4")
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

    def note(self, base: str | None, judge: str) -> str:
        """Say in a report what was drawn, on which base (None for the built-in model), and who judged it."""
        return (
            f"On {base or 'the built-in model'}: {self.pictures} pictures for each seed of each of the nine names, "
            f"{self.steps} steps, guidance {self.guidance:g}. ACC is by {judge}, among the nine names. The distance "
            "has LPIPS's form with the built-in judge's features, at 64 pixels: compare with published ones in "
            "direction only."
        )

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
