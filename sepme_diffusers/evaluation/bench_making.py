"""What making increments takes, against what the paper's authors and other erasers do."""

from __future__ import annotations

import copy
import multiprocessing
import resource
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.concepts import BLANK, Concept, encode, rows
from sepme_diffusers.config import SepMEConfig
from sepme_diffusers.evaluation.baselines import PaperStep, null_space_by_elimination, uce
from sepme_diffusers.evaluation.bench_base import Result, Workbench
from sepme_diffusers.evaluation.shapes import sd15_shape
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.pocket.concepts import GUARDS, regular_for_styles, style_concept
from sepme_diffusers.subspace import null_space
from sepme_diffusers.training import SepMETrainer, Step

# A picture a step, as in the authors' code.
_ONE = {"batch_size": 1, "n_images": 1, "image_steps": 1}


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
        yield self._step_time(self.large)
        yield self._step_memory()

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
        errors = [float((basis.to(part) @ part.T).abs().max()) for basis in (null_space(part), *theirs)]
        detail = (
            f"{len(part)} x {part.shape[1]} tokens, one prompt: {1e3 * fast:.1f} ms against {slow:.1f} s of sympy's "
            f"Matrix.nullspace on floats, max |G N| {errors[0]:.0e} against {errors[1]:.0e}; ours for all "
            f"{len(whole)} x {whole.shape[1]} of nine concepts: {statistics.median(all_ours):.2f} s"
        )
        return Result("null space of the guard", ">= 1000 x faster", f"{slow / fast:.0f} x", detail)

    def _step_time(self, pipe: Any) -> Result:
        """Ours and both ways of the paper's take turns within one training."""
        concept, blank = encode(pipe, ["cat"]), encode(pipe, [BLANK])
        edited, null = copy.deepcopy(pipe.unet), null_space(rows(blank))
        theirs = {
            freeze: PaperStep(pipe.unet, edited, null, concept, blank, SepMEConfig.paper(), freeze)
            for freeze in (True, False)
        }
        size = pipe.unet.config.sample_size
        noisy = torch.randn(1, pipe.unet.config.in_channels, size, size, device=pipe.device)
        at = torch.tensor([500], device=pipe.device)
        ours: list[float] = []
        paper: dict[bool, list[float]] = {True: [], False: []}
        started = 0.0

        def take_turns(step: Step) -> None:
            nonlocal started
            self._wait()
            ours.append(time.perf_counter() - started)
            for freeze, act in theirs.items():
                edited.requires_grad_(not freeze)
                paper[freeze].append(self._seconds(lambda act=act: act(noisy, at)))
                edited.zero_grad()
            started = time.perf_counter()

        steps = 1 + self.repeats  # the first of each warms up, and ours has pictures to draw
        config = SepMEConfig(**_ONE, tolerance=1e-9, min_steps=steps, max_steps=steps)
        SepMETrainer(pipe, config, on_step=take_turns).erase(["cat"])
        ratio, published = (
            statistics.median(a / b for a, b in zip(ours[1:], paper[freeze][1:], strict=True))
            for freeze in (True, False)
        )
        detail = (
            f"{statistics.median(ours[1:]):.1f} s against {statistics.median(paper[True][1:]):.1f} s, one picture a "
            f"step; the paper's four passes, its UNet's own weights left out of the gradient; with their gradients, "
            f"as in the authors' code: {published:.2f} x"
        )
        return Result("time of a training step", "<= 0.6 x", f"{ratio:.2f} x", detail)

    def _step_memory(self) -> Result:
        """Each in a process of its own, which builds the pipeline, takes two steps and says its peak."""
        peaks = {}
        for kind in ("ours", "ours, full basis", "paper", "paper, all gradients"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                peaks[kind] = alone.submit(peak_of, kind, str(self.device), self.dtype).result()
        ours, paper = peaks["ours"], peaks["paper"]
        what = "resident memory of the process" if self.device.type == "cpu" else "allocated memory of the device"
        detail = f"peak {what}, GB: " + ", ".join(f"{kind} {peak / 1e9:.2f}" for kind, peak in peaks.items())
        return Result("memory of a training step", "<= 0.6 x", f"{ours / paper:.2f} x", detail)

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
        detail = f"{ours:.1f} s against {theirs:.1f} s of UCE; encoding the {len(names) + 1} prompts once: {encoding:.1f} s"
        return Result(f"closed form of {len(names)} concepts", bar, f"{ratio:.2f} x", detail)

    def _steps_to_stop(self, styles: tuple[str, ...], config: SepMEConfig) -> Result:
        """Both stop at the same value of the momentum statistic: a share of the original model's loss."""
        full = SepMEConfig.paper(tolerance=config.tolerance, relative=True, beta=config.beta)
        counted, ratios = [], []
        for style in styles:
            # Before the first step the full basis has edited nothing: that loss is the original model's.
            first = self._losses(style, replace(full, min_steps=1, max_steps=1))[0].loss
            limit = config.tolerance * first
            ours, theirs = (steps_until(limit, self._losses(style, chosen, limit)) for chosen in (config, full))
            counted.append(f"{style} {ours} against {theirs}")
            ratios.append(ours / theirs)
        return Result("steps to the stopping rule", "<= 0.3 x", f"{statistics.median(ratios):.2f} x", "; ".join(counted))
