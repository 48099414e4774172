"""What making increments takes: null spaces, closed forms, and steps until training stops."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

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
    """Count training steps until the stopping rule, and time them, on the built-in model."""
    yield from stopping_steps(runner, ("neon", "woodcut", "mosaic"), SepMEConfig.linear(solver="closed_form+train"))


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


def stopping_steps(runner: Runner, styles: Sequence[str], config: SepMEConfig) -> Iterator[Figure]:
    """Count steps and time until the same value of the momentum statistic, a share of the original's correlation."""
    same = ("tolerance", "relative", "beta", "batch_size", "n_images", "image_steps", "guidance_scale")
    full = SepMEConfig.paper(**{name: getattr(config, name) for name in same})
    runs = [(style, _Run.of(runner, style, config), _Run.of(runner, style, full)) for style in styles]
    detail = f"built-in model, tolerance {config.tolerance}, the same beta"
    for what, unit in (("steps", ""), ("seconds", " s")):
        read = attrgetter(what)
        ratio = statistics.median(read(ours) / read(theirs) for _, ours, theirs in runs)
        counts = (f"{style} {read(a):.3g}{unit}{a.doubt} against {read(b):.3g}{unit}{b.doubt}" for style, a, b in runs)
        yield Figure(f"{what} to the stopping rule", f"{ratio:.2f} x", f"{detail}: {', '.join(counts)}")


@dataclass(frozen=True)
class _Run:
    """What training took: its steps, the seconds from the first to the last of them, and whether the rule stopped it.

    Both ours and the paper's first draw the same pictures, which is not counted.
    """

    steps: int
    seconds: float
    stopped: bool

    @classmethod
    def of(cls, runner: Runner, style: str, config: SepMEConfig) -> _Run:
        """Train a style."""
        others = [name for name in BANKED_STYLES if name != style]
        moments: list[float] = []
        trainer = SepMETrainer(
            runner.small, config, GUARDS, _REGULAR, others, on_step=lambda _: moments.append(time.perf_counter())
        )
        metrics = trainer.erase([style], kind="style")[style].metrics
        # The moment before the first step is not told; every step of a kind takes about as long.
        seconds = (moments[-1] - moments[0]) * len(moments) / max(1, len(moments) - 1)
        return cls(metrics["steps"], seconds, metrics["stopped_by_rule"])

    @property
    def doubt(self) -> str:
        """What else stopped it, if not the rule."""
        return "" if self.stopped else " (not stopped by the rule)"
