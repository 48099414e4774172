"""What making increments takes, against what the paper's authors and other erasers do."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.evaluation.baselines.paper import PaperStep, null_space_by_elimination
from sepme_diffusers.evaluation.baselines.uce import uce
from sepme_diffusers.evaluation.bench.runner import Result, Workbench, peak_resident
from sepme_diffusers.evaluation.bench.shapes import sd15_shape
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.loop import Step
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.pocket.concepts import BANKED_STYLES, GUARDS, regular_for_styles, style_concept
from sepme_diffusers.text.concept import BLANK, Concept
from sepme_diffusers.text.encoding import encode, rows

T = TypeVar("T")


class Making(Workbench):
    """The measurements on making increments, each a method."""

    def guard_basis(self) -> Iterator[Result]:
        """The null space of the guard prompts, against exact elimination."""
        names = list(words.OBJECTS)[:8]
        # What guards one of nine concepts: the blank prompt and the eight others.
        guard = encode(self.large, [BLANK, *names])
        yield self._against_elimination(rows(guard[:1]), rows(guard))

    def training_step(self) -> Iterator[Result]:
        """One training step, against the paper's: seconds, and peak memory."""
        # What earlier measures built here leaves its memory to the processes that each part runs in.
        vars(self).pop("large", None)
        gc.collect()
        yield from alone(step_times, str(self.device), self.dtype, self.repeats)
        yield from self._step_memory()

    def hundred_concepts(self) -> Iterator[Result]:
        """The closed form of a hundred concepts, against one fused edit of them all; from prompts to finished."""
        yield self._many([*words.STYLES, *words.OBJECTS][:100], "<= 2 x")

    def steps_to_stop(self) -> Iterator[Result]:
        """Training steps until the stopping rule on the built-in model, against the paper's full basis."""
        yield self._steps_to_stop(("neon", "woodcut", "mosaic"), SepMEConfig(solver="closed_form+train"))

    def _against_elimination(self, part: Tensor, whole: Tensor) -> Result:
        theirs: list[Tensor] = []
        slow = self._seconds(lambda: theirs.append(null_space_by_elimination(part)))
        ours = [self._seconds(lambda: null_space(part)) for _ in range(1 + self.repeats)][1:]
        all_ours = [self._seconds(lambda: null_space(whole)) for _ in range(1 + self.repeats)][1:]
        fast = statistics.median(ours)
        both = (null_space(part), theirs[0].to(part.device))
        errors = [float((basis @ part.T.double()).abs().max()) for basis in both]
        detail = (
            f"{len(part)} x {part.shape[1]} tokens, one prompt: {1e3 * fast:.1f} ms against {slow:.1f} s of sympy's "
            f"Matrix.nullspace on floats, max |G N| {errors[0]:.0e} against {errors[1]:.0e}; ours for all "
            f"{len(whole)} x {whole.shape[1]} of nine concepts: {statistics.median(all_ours):.2f} s"
        )
        return Result("null space of the guard", ">= 1000 x faster", f"{slow / fast:.0f} x", detail)

    def _step_times(self, pipe: Any) -> list[Result]:
        """Ours and both ways of the paper's take turns within one training."""
        edited = copy.deepcopy(pipe.unet)
        paper = {freeze: paper_step(pipe, edited, freeze) for freeze in AGAINST}
        noisy, at = picture(pipe)
        share = SepMEConfig().steps_per_batch
        steps: list[float] = []
        theirs: dict[bool, list[float]] = {freeze: [] for freeze in AGAINST}
        started = 0.0

        def take_turns(step: Step) -> None:
            nonlocal started
            self._wait()
            steps.append(time.perf_counter() - started)
            if step.step % share == 0:
                for freeze, act in paper.items():
                    theirs[freeze].append(self._seconds(lambda act=act: act(noisy, at)))
                    edited.zero_grad()
            started = time.perf_counter()

        trainer = SepMETrainer(pipe, single_steps(share * (1 + self.repeats)), on_step=take_turns)
        trainer.erase(["cat"])
        # The first batch warms up, and before it a picture is drawn. A batch's first step, like each of the paper's,
        # has noise of its own and the original's predictions on it.
        batches = [steps[start : start + share] for start in range(share, len(steps), share)]
        ours = {
            "with new noise": [batch[0] for batch in batches],
            f"mean of the {share} on a batch": [statistics.mean(batch) for batch in batches],
        }
        return [
            _step_time(what, mine, against, theirs[freeze][1:])
            for what, mine in ours.items()
            for freeze, against in AGAINST.items()
        ]

    def _step_memory(self) -> Iterator[Result]:
        """Each in a process of its own, which builds the pipeline, takes two steps and says its peak."""
        peaks = {kind: alone(peak_of, kind, str(self.device), self.dtype) for kind in PEAKS}
        what = "resident memory of the process" if self.device.type != "cuda" else "memory allocated on the device"
        detail = f"peak {what}, GB: " + ", ".join(f"{kind} {peak / 1e9:.2f}" for kind, peak in peaks.items())
        for against in AGAINST.values():
            measure = f"memory of a training step, against {against}"
            yield Result(measure, "<= 0.6 x", f"{peaks['ours'] / peaks[against]:.3f} x", detail)

    def _many(self, names: list[str], bar: str) -> Result:
        concepts = [Concept(name) for name in names]
        config = SepMEConfig(solver="closed_form", rank=8)
        turns = {
            "ours": lambda: SepMETrainer(self.large, config).erase(concepts),
            "uce": lambda: uce(self.large, concepts, [BLANK]),
        }
        taken: dict[str, list[float]] = {name: [] for name in turns}
        for index in range(min(self.repeats, 3)):
            for name in list(turns) if index % 2 == 0 else list(reversed(turns)):
                taken[name].append(self._seconds(turns[name]))
        ratio = statistics.median(a / b for a, b in zip(taken["ours"], taken["uce"], strict=True))
        encoding = self._seconds(lambda: encode(self.large, [*names, BLANK]))
        ours, theirs = (statistics.median(times) for times in taken.values())
        detail = (
            f"{ours:.1f} s against {theirs:.1f} s of UCE; encoding the {len(names) + 1} prompts once: {encoding:.1f} s"
        )
        return Result(f"closed form of {len(names)} concepts", bar, f"{ratio:.2f} x", detail)

    def _steps_to_stop(self, styles: tuple[str, ...], config: SepMEConfig) -> Result:
        """Both stop at the same value of the momentum statistic, a share of the original model's correlation."""
        full = SepMEConfig.paper(tolerance=config.tolerance, relative=True, beta=config.beta)
        counted, ratios = [], []
        for style in styles:
            ours, theirs = (self._trained(style, chosen) for chosen in (config, full))
            counted.append(f"{style} {said(ours)} against {said(theirs)}")
            ratios.append(ours["steps"] / theirs["steps"])
        detail = f"built-in model, tolerance {config.tolerance}, the same beta: {', '.join(counted)}"
        return Result("steps to the stopping rule", "<= 0.3 x", f"{statistics.median(ratios):.2f} x", detail)

    def _trained(self, style: str, config: SepMEConfig) -> dict[str, Any]:
        """The metrics of a style's increment."""
        others = [name for name in BANKED_STYLES if name != style]
        trainer = SepMETrainer(self.small, config, GUARDS, regular_for_styles(style), others)
        return trainer.erase([style_concept(style)])[style].metrics


# The paper's step by whether the UNet's own weights, which it does not train, are left out of the gradient. In the
# authors' code they are not.
AGAINST = {
    False: "the paper's with all gradients, as in its code",
    True: "the paper's with only the gradients it needs",
}
PEAKS = ("ours", "ours, full basis", *AGAINST.values())


def single_steps(count: int, full: bool = False) -> SepMEConfig:
    """A config that takes so many steps of one picture each, as in the authors' code; on the paper's full basis."""
    few = {"batch_size": 1, "n_images": 1, "image_steps": 1, "min_steps": count, "max_steps": count}
    return SepMEConfig.paper(**few) if full else SepMEConfig(**few)


def paper_step(pipe: Any, edited: torch.nn.Module, freeze: bool) -> PaperStep:
    """The paper's step for one concept that is guarded on the blank prompt; `edited` is a copy of the UNet."""
    concept, blank = encode(pipe, ["cat"]), encode(pipe, [BLANK])
    null = null_space(rows(blank)).to(concept.device)
    return PaperStep(pipe.unet, edited, null, concept, blank, SepMEConfig.paper(), freeze)


def picture(pipe: Any) -> tuple[Tensor, Tensor]:
    """Noise as large as the pipeline's latents (1, channels, h, w), and a timestep (1,)."""
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    return torch.randn(1, channels, size, size).to(pipe.device), torch.tensor([500], device=pipe.device)


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns in a new process: its memory starts empty, and all of it is given back."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def _step_time(what: str, ours: list[float], against: str, theirs: list[float]) -> Result:
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    mine, other = statistics.median(ours), statistics.median(theirs)
    detail = f"one picture a step, {len(ours)} pairs: {mine:.1f} s against {other:.1f} s"
    return Result(f"time of a training step, {what}, against {against}", "<= 0.6 x", f"{ratio:.2f} x", detail)


def step_times(device: str, dtype: torch.dtype, repeats: int) -> list[Result]:
    """The time of a training step against both of `AGAINST`, for a process that does nothing else."""
    bench = Making(device, dtype, repeats)
    return bench._step_times(bench.large)


def peak_of(kind: str, device: str, dtype: torch.dtype) -> int:
    """Bytes at the peak of two training steps of one of `PEAKS`, for a process that does nothing else."""
    pipe = sd15_shape(dtype).to(device)
    if kind.startswith("ours"):
        SepMETrainer(pipe, single_steps(2, full="full" in kind)).erase(["cat"])
    else:
        act = paper_step(pipe, copy.deepcopy(pipe.unet), freeze=kind == AGAINST[True])
        for _ in range(2):
            act(*picture(pipe))
    return torch.cuda.max_memory_allocated() if pipe.device.type == "cuda" else peak_resident()


def said(metrics: dict[str, Any]) -> str:
    """Steps as text, with what stopped them where it was not the rule."""
    return str(metrics["steps"]) + ("" if metrics["stopped_by_rule"] else " (not stopped by the rule)")
