"""What a user types: concepts drawn at random, erased by names or by two templates, and measured where it is hard."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from sepme_diffusers import pocket
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.measures.accuracy import judged, shown
from sepme_diffusers.evaluation.measures.perceptual import perceptual_distance
from sepme_diffusers.evaluation.pictures import PictureCache, erased, generate
from sepme_diffusers.evaluation.probes import DOUBLED, WORDINGS, Kind, Probe, joined, pairs_probe, plain_probe, probe
from sepme_diffusers.evaluation.protocols.erasures import GUARDS, KIND_OF, without_gates
from sepme_diffusers.evaluation.protocols.text_search import hidden_prompts
from sepme_diffusers.evaluation.report import Bar, Table
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.text.concept import Concept

NAMES, TEMPLATES, ADAPTERS, TRAINED = "names", "two templates", "names, without gates", "names, then trained"
DESCRIBED = (NAMES, TEMPLATES, ADAPTERS)
"""How the concepts of a draw are described, and whether their increments keep their gates."""
EVERY = (*DESCRIBED, TRAINED)
"""The same, and what takes a minute for each concept: training on from the default."""
_AT_ONCE, _RESTORED = 6, 2
# Groups of prompts: of what is erased, with what reports call them; of what is not; and those for the default alone.
_ERASED = {"erased": "erased", "second": "erased, second names", "doubled": "erased, doubled"}
_KEPT = ("regular", "unseen", "plain")
_HARD = ("doubled", "worded")
_STRONG = (7.5, 12.0)
# What a user writes who gives pairs of prompts: (with the concept, without).
_PAIRS: dict[Kind, tuple[tuple[str, str], ...]] = {
    "styles": (("a cat in the style of {concept}", "a cat"), ("{concept} cat", "cat")),
    "objects": (("a {concept}", ""), ("a picture of a {concept}", "a picture")),
}


@dataclass(frozen=True)
class Draw:
    """Six concepts of one kind."""

    kind: Kind
    names: tuple[str, ...]


def draws(kind: Kind, seed: int, count: int) -> list[Draw]:
    """Draw six of all styles, or of all objects, several times."""
    rng, known = random.Random(f"{kind} {seed}"), {"styles": pocket.styles, "objects": pocket.objects}[kind]
    return [Draw(kind, tuple(rng.sample(known, _AT_ONCE))) for _ in range(count)]


@dataclass(frozen=True)
class Result:
    """What was measured on a draw.

    Args:
        draw: The concepts.
        described: How they were described.
        figures: {measure: value}, in percent where it is a share.
    """

    draw: Draw
    described: str
    figures: Mapping[str, float]


class NamesRunner:
    """Erases draws of six concepts and measures them.

    Args:
        pipe: The built-in model's pipeline, with nothing loaded.
        seed: Of the pictures.
        each: Pictures of each concept in each group.
        steps: Denoising steps per picture.
    """

    def __init__(self, pipe: Any, seed: int, each: int, steps: int) -> None:
        self.pipe, self.seed, self.each = pipe, seed, each
        self.cache = PictureCache(pipe, steps)
        self.strong = {guidance: PictureCache(pipe, steps, guidance) for guidance in _STRONG}

    def bank(self, draw: Draw, described: str) -> ConceptBank:
        """Make the increments of a draw by a plain call."""
        config = SepMEConfig(solver="closed_form+train" if described == TRAINED else "closed_form")
        trainer = SepMETrainer(self.pipe, config, GUARDS)
        if described == TEMPLATES:
            prompts, plain = zip(*_PAIRS[draw.kind], strict=True)
            return trainer.erase([Concept.from_template(name, prompts, plain) for name in draw.names])
        bank = trainer.erase(draw.names, kind=KIND_OF[draw.kind])
        return without_gates(bank) if described == ADAPTERS else bank

    def probes(self, draw: Draw) -> dict[str, Probe]:
        """Write the prompts of each group, in held-out templates."""
        kind, each = draw.kind, self.each
        second = {"styles": words.STYLES, "objects": words.OBJECTS}[kind]
        known = {"styles": words.UNBANKED_STYLES, "objects": words.UNBANKED_OBJECTS}[kind]
        styles = [name for name in words.BANKED_STYLES if name not in draw.names]
        objects = [name for name in words.TEST_OBJECTS if name not in draw.names]
        unseen = [name for name in known if name not in draw.names]
        pairs = (unseen, objects) if kind == "styles" else (styles, unseen)
        count, templates = _AT_ONCE * each, words.HELD_OUT_TEMPLATES
        groups = {
            "erased": [probe(kind, name, each, self.seed) for name in draw.names],
            "second": [probe(kind, n, each, self.seed + 500, word=str(second[n])) for n in draw.names if second[n]],
            "doubled": [probe(kind, name, each, self.seed + 1000, DOUBLED[kind]) for name in draw.names],
            "worded": [probe(kind, n, 2 * each, self.seed + 1500, WORDINGS[kind]) for n in draw.names],
            "regular": [pairs_probe(styles, objects, templates, count, self.seed + 2000)],
            "unseen": [pairs_probe(*pairs, templates, count // 2, self.seed + 3000)] if unseen else [],
            "plain": [plain_probe(count // 2, self.seed + 4000, objects)],
        }
        return {name: joined(parts) for name, parts in groups.items() if parts}

    def measure(self, draw: Draw, described: str) -> Result:
        """Erase a draw, draw its pictures and measure them; what is hard, for the default alone."""
        bank, probes = self.bank(draw, described), self.probes(draw)
        if described == NAMES:
            probes |= {"hidden": joined(self._hidden(draw, bank, name) for name in draw.names)}
        else:
            probes = {name: probe for name, probe in probes.items() if name not in _HARD}
        probes = {name: probe for name, probe in probes.items() if probe.prompts}
        groups = {name: Group(draw.kind, probe) for name, probe in probes.items()}
        self._draw(groups, "before")
        with erased(self.pipe, bank, draw.names):
            self._draw(groups, "after")
            figures = _figures(groups)
            if described == NAMES:
                figures |= _hard(groups) | self._strong(groups["erased"]) | self._restored(draw, groups["erased"])
        return Result(draw, described, figures)

    def _draw(self, groups: Mapping[str, Group], moment: str) -> None:
        drawn = self.cache.draw([group.probe for group in groups.values()])
        for group, pictures in zip(groups.values(), drawn, strict=True):
            group.pictures[moment] = pictures

    def _hidden(self, draw: Draw, bank: ConceptBank, name: str) -> Probe:
        prompts = tuple(hidden_prompts(self.pipe, bank[name], draw.kind))
        # Of the other kind nothing is judged.
        styles, objects = (name, pocket.objects[0]) if draw.kind == "styles" else (words.PLAIN, name)
        n = len(prompts)
        return Probe(prompts, (styles,) * n, (objects,) * n, tuple(range(self.seed, self.seed + n)))

    def _strong(self, group: Group) -> dict[str, float]:
        """What strong guidance shows of the erased concepts."""
        return {
            f"erased, guidance {guidance:g}: ACC %": group.accuracies(cache.draw([group.probe])[0])[0]
            for guidance, cache in self.strong.items()
        }

    def _restored(self, draw: Draw, group: Group) -> dict[str, float]:
        """Restore two of the six: which of all their pictures are those with nothing erased."""
        drawn = []
        # Anew, in batches of one shape: what else is in a batch moves its last bit.
        for erased_now in ((), draw.names[_RESTORED:]):
            self.pipe.set_erased(erased_now)
            drawn.append(generate(self.pipe, group.probe.prompts, group.probe.seeds, self.cache.steps))
        places = [index for index, name in enumerate(group.truth) if name in draw.names[:_RESTORED]]
        same = sum(drawn[0][index].tobytes() == drawn[1][index].tobytes() for index in places)
        return {"restored, four active: equal to the bit %": 100 * same / len(places)}


@dataclass
class Group:
    """Prompts of one group, with their pictures before and after.

    Args:
        kind: What is erased.
        probe: The prompts.
        pictures: {moment: pictures}.
    """

    kind: Kind
    probe: Probe
    pictures: dict[str, list[Image.Image]] = field(default_factory=dict)

    @property
    def truth(self) -> Sequence[str]:
        """What each picture shows of the kind."""
        return self.probe.styles if self.kind == "styles" else self.probe.objects

    def accuracies(self, pictures: list[Image.Image]) -> tuple[float, float]:
        """ACC of the kind, and of the other one."""
        style, object_ = judged(pictures, self.probe.styles, self.probe.objects)
        return (style, object_) if self.kind == "styles" else (object_, style)

    def shows(self, moment: str) -> Tensor:
        """Tell in which pictures of a moment the judge sees the concept, (n_pictures,)."""
        return shown(self.pictures[moment], self.probe.styles, self.probe.objects)[self.kind == "objects"]


def _figures(groups: Mapping[str, Group]) -> dict[str, float]:
    before, after = (
        {name: group.accuracies(group.pictures[moment]) for name, group in groups.items()}
        for moment in ("before", "after")
    )
    figures = {f"{what}: ACC %": after[name][0] for name, what in _ERASED.items() if name in groups}
    figures["erased: other kind, of the original's %"] = 100 * after["erased"][1] / before["erased"][1]
    kept = [name for name in _KEPT if name in groups]
    figures |= {f"{name}: ACC, of the original's %": 100 * sum(after[name]) / sum(before[name]) for name in kept}
    then, now = ([p for name in kept for p in groups[name].pictures[moment]] for moment in ("before", "after"))
    return figures | {"not erased: perceptual distance": perceptual_distance(now, then)}


def _hard(groups: Mapping[str, Group]) -> dict[str, float]:
    """Of free wordings in which the original draws the concept, and of searched prompts: what still shows it."""
    worded = groups["worded"]
    drawn, left = worded.shows("before"), worded.shows("after")
    figures = {"wordings": float(drawn.sum())}
    if drawn.any():
        figures["wordings that still show it %"] = 100 * float(left[drawn].double().mean())
    if "hidden" in groups:
        figures["searched prompts"] = float(len(groups["hidden"].probe.prompts))
        figures["searched prompts that show it %"] = 100 * float(groups["hidden"].shows("after").double().mean())
    return figures


_MOST: dict[str, float] = {
    "erased: ACC %": 10, "erased, second names: ACC %": 20, "erased, doubled: ACC %": 10,
    "erased, guidance 7.5: ACC %": 10, "erased, guidance 12: ACC %": 10, "not erased: perceptual distance": 0.05,
}  # fmt: skip
# Of all draws together, for one draw has too few: {share: (bar, of how many)}.
_TOGETHER: dict[str, tuple[float, str]] = {
    "wordings that still show it %": (2, "wordings"), "searched prompts that show it %": (5, "searched prompts"),
}  # fmt: skip
_LEAST: dict[str, float] = {
    "erased: other kind, of the original's %": 98, "regular: ACC, of the original's %": 99,
    "plain: ACC, of the original's %": 99, "unseen: ACC, of the original's %": 97,
    "restored, four active: equal to the bit %": 99,
}  # fmt: skip
# Without a gate every prompt moves a little, in proportion to what it reads.
_WITHOUT_GATES: dict[str, float] = {"regular: ACC, of the original's %": 95, "plain: ACC, of the original's %": 95}


def bars(results: Sequence[Result]) -> list[Bar]:
    """Compare the worst draw of each kind and description with its bars; free wordings and searches of all draws."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.draw.kind, result.described), []).append(result)
    compared = []
    for (kind, described), some in groups.items():
        most = {"erased: ACC %": _MOST["erased: ACC %"]} if described == ADAPTERS else _MOST
        least = _WITHOUT_GATES if described == ADAPTERS else _LEAST
        for limits, worst, sign in ((most, max, "<="), (least, min, ">=")):
            compared += _bars(f"{kind} by {described}", some, limits, worst, sign)
        compared += _together(f"{kind} by {described}, all draws", some)
    return compared


def _together(what: str, results: Sequence[Result]) -> list[Bar]:
    made = []
    for measure, (limit, of) in _TOGETHER.items():
        cases = [(r.figures[measure], r.figures[of]) for r in results if measure in r.figures]
        if cases:
            count = sum(n for _, n in cases)
            share = sum(value * n for value, n in cases) / count
            made.append(Bar(f"{what}: {measure}", f"<= {limit:g}", f"{share:.1f} of {count:.0f}", share <= limit))
    return made


def _bars(
    what: str, results: Sequence[Result], limits: Mapping[str, float], worst: Callable[..., float], sign: str
) -> list[Bar]:
    made = []
    for measure, limit in limits.items():
        values = [result.figures[measure] for result in results if measure in result.figures]
        if values:
            value = worst(values)
            met = value <= limit if sign == "<=" else value >= limit
            made.append(Bar(f"{what}: {measure}", f"{sign} {limit:g}", _shown(measure, value), met))
    return made


def _shown(measure: str, value: float) -> str:
    return f"{value:.3f}" if "distance" in measure else f"{value:.1f}"


def table(results: Sequence[Result]) -> Table:
    """Tabulate the draws, a row each."""
    measures = list(dict.fromkeys(measure for result in results for measure in result.figures))
    rows = tuple(
        (
            ", ".join(result.draw.names),
            result.described,
            *(_shown(m, result.figures[m]) if m in result.figures else "" for m in measures),
        )
        for result in results
    )
    return Table("Each draw", ("erased at once", "described by", *measures), rows)
