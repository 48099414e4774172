"""Ablations: what one setting at a time does to erased and to regular pictures, and to the size of the increments."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.evaluation.protocols.erasures import GUARDS, concepts_of
from sepme_diffusers.evaluation.protocols.variant_runner import Row, VariantRunner
from sepme_diffusers.evaluation.protocols.variants import STYLES, Edit
from sepme_diffusers.evaluation.report import Table
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.loop import Step
from sepme_diffusers.making.regular import regular_guards
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.text.encoding import encode

_REGULAR = 1000
# As many guards are compared by how alike they are to what is erased.
_ALIKE = 8


@dataclass(frozen=True)
class Choice:
    """One way to make the increments.

    Args:
        settings: Of `SepMEConfig.linear`: without a gate, which would hide what a setting does.
        guards: How many more names are guarded exactly.
        alike: Which: the first ones of a list ("any"), the "most" alike to what is erased, or the "least".
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    guards: int = 0
    alike: str = "any"


def _trained(setting: str, values: Sequence[float]) -> dict[str, Choice]:
    """Choices of a training's setting, left as the stop rule leaves it: scaled to zero they would be more alike."""
    return {f"{value:g}": Choice({"solver": "train", "rescale": False, setting: value}) for value in values}


# To add an ablation, list it here: {what is varied: {value: how the increments are made}}.
ABLATIONS: dict[str, dict[str, Choice]] = {
    "tolerance (τ)": _trained("tolerance", (0.0, 0.02, 0.1, 0.3)),
    "beta (β)": _trained("beta", (1e-3, 3e-3, 1e-2)),
    "sparsity (λ)": _trained("sparsity", (0.0, 1e-6, 1e-4)),
    "rank": {str(rank): Choice({"rank": rank}) for rank in (1, 4, 16, 64)},
    "guarded names": {str(count): Choice({"reserve": 0.01}, count) for count in (0, 4, 8, 12, 16)},
    "likeness of the guards": {which: Choice({}, _ALIKE, which) for which in ("least", "any", "most")},
}


@dataclass(frozen=True)
class Point:
    """What one value did.

    Args:
        ablation: What is varied.
        value: Its value.
        row: What it did to pictures.
        norm: ‖ΔW‖ of an increment: over all modules, the mean of the styles.
        reach: ‖E P‖ / ‖E‖, the mean of the styles.
    """

    ablation: str
    value: str
    row: Row
    norm: float
    reach: float


class Ablator:
    """Makes increments of two styles with one setting changed, and measures them.

    Args:
        pipe: The built-in model's pipeline, with nothing loaded.
        runner: Measures.
        on_step: Called after every training step.
    """

    def __init__(self, pipe: Any, runner: VariantRunner, on_step: Callable[[Step], None] | None = None) -> None:
        self.pipe, self.runner, self.on_step = pipe, runner, on_step
        self.concepts, self.regular = concepts_of(pipe, "styles", STYLES), regular_guards(pipe, _REGULAR)

    def measure(self, ablation: str, value: str) -> Point:
        """Make and measure one point of `ABLATIONS`."""
        choice = ABLATIONS[ablation][value]
        bank = self._bank(choice)
        edit = Edit(bank, sum(entry.metrics.get("steps", 0) for entry in bank.values()))
        norm, weights = [], projection_weights(self.pipe.unet)
        for entry in bank.values():
            deltas = entry.increment.delta_weights(weights).values()
            norm.append(float(torch.stack([delta.square().sum() for delta in deltas]).sum().sqrt()))
        reach = [float(entry.metrics["reach"]) for entry in bank.values()]
        return Point(ablation, value, self.runner.row(value, edit), sum(norm) / len(norm), sum(reach) / len(reach))

    def _bank(self, choice: Choice) -> ConceptBank:
        guards = (*GUARDS, *self.names(choice.alike)[: choice.guards])
        config = SepMEConfig.linear(**choice.settings)
        return SepMETrainer(self.pipe, config, guards, self.regular, on_step=self.on_step).erase(self.concepts)

    def names(self, alike: str) -> tuple[str, ...]:
        """List objects and styles that may be guarded, by how alike their prompts are to what is erased."""
        names = [*words.BANKED_OBJECTS, *(style for style in words.BANKED_STYLES if style not in STYLES)]
        if alike == "any":
            return tuple(names)
        means = encode(self.pipe, [*STYLES, *names]).mean(dim=1)
        means = means - means.mean(dim=0)
        own = means[: len(STYLES)]
        likeness = [float(cosine_similarity(own, mean[None]).max()) for mean in means[len(STYLES) :]]
        ranked = sorted(range(len(names)), key=lambda index: likeness[index], reverse=alike == "most")
        return tuple(names[index] for index in ranked)


def table(points: Sequence[Point]) -> Table:
    """Tabulate a row for each point."""
    shown = (("erased", "style ACC %"), ("erased", "object ACC %"), ("regular", "style ACC %"))
    rows = tuple(
        (
            point.ablation, point.value, *(point.row.shown(*column) for column in shown),
            point.row.shown("regular", "perceptual distance"), f"{point.norm:.2f}", f"{point.reach:.2f}",
            str(point.row.steps or ""),
        )
        for point in points
    )  # fmt: skip
    columns = (*(f"{group}: {measure}" for group, measure in shown), "regular: distance", "‖ΔW‖", "reach", "steps")
    return Table(f"Erasing {' and '.join(STYLES)}, without gates", ("varied", "value", *columns), rows)


def plot(points: Sequence[Point]) -> Image.Image:
    """Plot, for each ablation, erased accuracy, and the size of the increments beside what regular pictures moved."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(point.ablation for point in points))
    figure = Figure(figsize=(4 * len(names), 5), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        own = [point for point in points if point.ablation == name]
        values = [point.value for point in own]
        upper, lower = axes[0][column], axes[1][column]
        upper.plot(values, [point.row.figures["erased"]["style ACC %"] for point in own], "o-", color="tab:red")
        upper.set(title=name, ylim=(-5, 105), ylabel="erased: style ACC %" if column == 0 else "")
        moved = [point.row.figures["regular"]["perceptual distance"] for point in own]
        lower.plot(values, moved, "o-", color="tab:blue")
        lower.set(ylim=(0, 1.1 * max(p.row.figures["regular"]["perceptual distance"] for p in points) + 1e-4))
        sizes = lower.twinx()
        sizes.plot(values, [point.norm for point in own], "s--", color="tab:gray")
        sizes.set(ylim=(0, 1.1 * max(point.norm for point in points)))
        if column == 0:
            lower.set_ylabel("regular: distance (blue)")
        if column == len(names) - 1:
            sizes.set_ylabel("‖ΔW‖ (grey)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer).convert("RGB")
