"""A training step against the paper's: seconds, and peak memory."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.evaluation.bench.measure import Figure, measure
from sepme_diffusers.evaluation.bench.paper import PaperStep
from sepme_diffusers.evaluation.bench.processes import alone, peak_resident
from sepme_diffusers.evaluation.bench.runner import Runner
from sepme_diffusers.evaluation.bench.shapes import sd15_shape
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.loop import Step
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.text.concept import BLANK, Concept
from sepme_diffusers.text.encoding import encode, rows

# The paper's step by whether it is as in the authors' code, see `PaperStep`.
PAPERS_STEPS = {
    True: "the paper's as its code takes it",
    False: "the paper's with only the gradients it needs",
}
STEPS = ("ours", "ours, full basis", *PAPERS_STEPS.values())


@measure("<= 0.6 x", "the paper's training step")
def training_step(runner: Runner) -> Iterator[Figure]:
    """Measure the time and the peak memory of a training step."""
    # The memory of what earlier measures built here is for the processes that each part runs in.
    runner.free_large()
    gc.collect()
    yield from alone(step_times_alone, str(runner.device), runner.dtype, runner.repeats)
    yield from _peaks(runner)


def step_times_alone(device: str, dtype: torch.dtype, repeats: int) -> list[Figure]:
    """Time training steps in a process that does nothing else."""
    return step_times(Runner(device, dtype, repeats))


def step_times(runner: Runner) -> list[Figure]:
    """Time our step and both of the paper's, taking turns within one training."""
    pipe = runner.large
    edited = copy.deepcopy(pipe.unet)
    papers = {as_coded: paper_step(pipe, edited, as_coded) for as_coded in PAPERS_STEPS}
    noisy, at = noisy_picture(pipe)
    share = SepMEConfig().steps_per_batch
    ours: list[float] = []
    theirs: dict[bool, list[float]] = {as_coded: [] for as_coded in PAPERS_STEPS}
    started = 0.0

    def take_turns(step: Step) -> None:
        nonlocal started
        runner.wait()
        ours.append(time.perf_counter() - started)
        if step.step % share == 0:
            for as_coded, act in papers.items():
                theirs[as_coded].append(runner.seconds(partial(act, noisy, at)))
                edited.zero_grad()
        started = time.perf_counter()

    trainer = SepMETrainer(pipe, single_steps(share * (1 + runner.repeats)), on_step=take_turns)
    trainer.erase([Concept.paper("cat")])
    # The first batch warms up, and before it a picture is drawn. A batch's first step, like each of the paper's, has
    # noise of its own and the original's predictions on it.
    batches = [ours[start : start + share] for start in range(share, len(ours), share)]
    seconds = {
        "with new noise": [batch[0] for batch in batches],
        f"mean of the {share} on a batch": [statistics.mean(batch) for batch in batches],
    }
    return [
        _step_time(what, mine, against, theirs[as_coded][1:])
        for what, mine in seconds.items()
        for as_coded, against in PAPERS_STEPS.items()
    ]


def _step_time(what: str, ours: list[float], against: str, theirs: list[float]) -> Figure:
    ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
    mine, other = statistics.median(ours), statistics.median(theirs)
    detail = f"one picture per step, {len(ours)} pairs: {mine:.1f} s against {other:.1f} s"
    return Figure(f"time of a training step, {what}, against {against}", f"{ratio:.2f} x", detail)


def _peaks(runner: Runner) -> Iterator[Figure]:
    """Compare peak memory, of each kind of step in a process of its own."""
    peaks = {kind: alone(peak_of, kind, str(runner.device), runner.dtype) for kind in STEPS}
    what = "memory allocated on the device" if runner.device.type == "cuda" else "resident memory of the process"
    detail = f"peak {what}, GB: " + ", ".join(f"{kind} {peak / 1e9:.2f}" for kind, peak in peaks.items())
    for against in PAPERS_STEPS.values():
        yield Figure(
            f"memory of a training step, against {against}", f"{peaks['ours'] / peaks[against]:.3f} x", detail
        )


def peak_of(kind: str, device: str, dtype: torch.dtype) -> int:
    """Count the bytes at the peak of two training steps of one of `STEPS`, for a process that does nothing else."""
    pipe = sd15_shape(dtype).to(device)
    if kind.startswith("ours"):
        SepMETrainer(pipe, single_steps(2, full="full" in kind)).erase([Concept.paper("cat")])
    else:
        act = paper_step(pipe, copy.deepcopy(pipe.unet), kind == PAPERS_STEPS[True])
        for _ in range(2):
            act(*noisy_picture(pipe))
    return torch.cuda.max_memory_allocated() if pipe.device.type == "cuda" else peak_resident()


def single_steps(count: int, full: bool = False) -> SepMEConfig:
    """Configure so many steps of one picture each, as in the authors' code; on the paper's full basis where asked."""
    few: dict[str, Any] = {"batch_size": 1, "n_images": 1, "image_steps": 1, "min_steps": count, "max_steps": count}
    return SepMEConfig.paper(**few) if full else SepMEConfig.linear(**({"solver": "train"} | few))


def paper_step(pipe: Any, edited: torch.nn.Module, as_coded: bool) -> PaperStep:
    """Make the paper's step for one concept that is guarded on the blank prompt; `edited` is a copy of the UNet."""
    concept, blank = encode(pipe, ["cat"]), encode(pipe, [BLANK])
    null = null_space(rows(blank)).to(concept.device)
    return PaperStep(pipe.unet, edited, null, concept, blank, SepMEConfig.paper(), as_coded)


def noisy_picture(pipe: Any) -> tuple[Tensor, Tensor]:
    """Draw noise as large as the pipeline's latents (1, channels, h, w), and give a timestep (1,)."""
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    return torch.randn(1, channels, size, size).to(pipe.device), torch.tensor([500], device=pipe.device)
