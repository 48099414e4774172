"""What making increments takes: null spaces, closed forms, and steps until training stops."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.evaluation.baselines.uce import uce
from sepme_diffusers.evaluation.bench.measure import Figure, measure
from sepme_diffusers.evaluation.bench.paper import null_space_by_elimination
from sepme_diffusers.evaluation.bench.runner import Runner
from sepme_diffusers.evaluation.protocols.erasures import GUARDS
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.pocket.vocabulary import BANKED_STYLES
from sepme_diffusers.text.concept import BLANK, Concept
from sepme_diffusers.text.encoding import encode, rows

_REGULAR = 1000


@measure(">= 1000 x faster", "sympy's Matrix.nullspace on floats, as in the authors' code")
def guard_basis(runner: Runner) -> Iterator[Figure]:
    """Time the null space of the guard prompts."""
    # What guards one of nine concepts: the blank prompt and the eight others.
    guard = encode(runner.large, [BLANK, *list(words.OBJECTS)[:8]])
    yield against_elimination(runner, rows(guard[:1]), rows(guard))


@measure("<= 2 x", "one fused edit of them all by UCE")
def hundred_concepts(runner: Runner) -> Iterator[Figure]:
    """Time the closed form of a hundred concepts, from prompts to finished increments."""
    yield closed_forms(runner, [*words.STYLES, *words.OBJECTS][:100])


@measure("<= 0.3 x", "the paper's full basis")
def steps_to_stop(runner: Runner) -> Iterator[Figure]:
    """Count the training steps until the stopping rule on the built-in model."""
    yield stopping_steps(runner, ("neon", "woodcut", "mosaic"), SepMEConfig.linear(solver="closed_form+train"))


def against_elimination(runner: Runner, part: Tensor, whole: Tensor) -> Figure:
    """Time the null space of the rows `part` by elimination and by ours, and of all rows by ours alone."""
    eliminated: list[Tensor] = []
    slow = runner.seconds(lambda: eliminated.append(null_space_by_elimination(part)))
    fast = runner.median_seconds(lambda: null_space(part))
    for_all = runner.median_seconds(lambda: null_space(whole))
    bases = (null_space(part), eliminated[0].to(part.device))
    errors = [float((basis @ part.T.double()).abs().max()) for basis in bases]
    detail = (
        f"{len(part)} x {part.shape[1]} tokens, one prompt: {1e3 * fast:.1f} ms against {slow:.1f} s of sympy's "
        f"Matrix.nullspace on floats, max |G N| {errors[0]:.0e} against {errors[1]:.0e}; ours for all "
        f"{len(whole)} x {whole.shape[1]} of nine concepts: {for_all:.2f} s"
    )
    return Figure("null space of the guard", f"{slow / fast:.0f} x", detail)


def closed_forms(runner: Runner, names: Sequence[str]) -> Figure:
    """Time the increments of these concepts in closed form and a fused edit of them by UCE."""
    concepts = [Concept.paper(name) for name in names]
    config = SepMEConfig.linear(rank=8)
    acts = {
        "ours": lambda: SepMETrainer(runner.large, config).erase(concepts),
        "uce": lambda: uce(runner.large, concepts, [BLANK]),
    }
    taken = runner.take_turns(acts, min(runner.repeats, 3))
    ratio = statistics.median(ours / theirs for ours, theirs in zip(taken["ours"], taken["uce"], strict=True))
    encoding = runner.seconds(lambda: encode(runner.large, [*names, BLANK]))
    ours, theirs = (statistics.median(seconds) for seconds in taken.values())
    detail = (
        f"{ours:.1f} s against {theirs:.1f} s of UCE; encoding the {len(names) + 1} prompts once: {encoding:.1f} s"
    )
    return Figure(f"closed form of {len(names)} concepts", f"{ratio:.2f} x", detail)


def stopping_steps(runner: Runner, styles: Sequence[str], config: SepMEConfig) -> Figure:
    """Count training steps until the same value of the momentum statistic, a share of the original's correlation."""
    same = ("tolerance", "relative", "beta", "min_steps", "batch_size", "n_images", "image_steps", "guidance_scale")
    full = SepMEConfig.paper(**{name: getattr(config, name) for name in same})
    counted, ratios = [], []
    for style in styles:
        ours, theirs = (_metrics_of(runner, style, chosen) for chosen in (config, full))
        counted.append(f"{style} {_steps(ours)} against {_steps(theirs)}")
        ratios.append(ours["steps"] / theirs["steps"])
    detail = f"built-in model, tolerance {config.tolerance}, the same beta: {', '.join(counted)}"
    return Figure("steps to the stopping rule", f"{statistics.median(ratios):.2f} x", detail)


def _metrics_of(runner: Runner, style: str, config: SepMEConfig) -> Mapping[str, Any]:
    others = [name for name in BANKED_STYLES if name != style]
    trainer = SepMETrainer(runner.small, config, GUARDS, _REGULAR, others)
    return trainer.erase([style], kind="style")[style].metrics


def _steps(metrics: Mapping[str, Any]) -> str:
    """Write steps as text, with what stopped them where it was not the rule."""
    return str(metrics["steps"]) + ("" if metrics["stopped_by_rule"] else " (not stopped by the rule)")
