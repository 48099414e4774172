"""Training six concepts together (the paper's †) against one after the other: the time of a step of all six."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.evaluation.bench.measure import Figure, measure
from sepme_diffusers.evaluation.bench.runner import Runner
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.learner import Learner
from sepme_diffusers.making.loop import take_step
from sepme_diffusers.making.noise import NoisyPictures
from sepme_diffusers.pocket.vocabulary import BANKED_STYLES
from sepme_diffusers.text.concept import BLANK, Concept
from sepme_diffusers.text.encoding import Encoded, encode, rows

_SIX = 6


@measure("<= 0.6 x at batch 1", "the same steps taken one concept after the other")
def joint_training(runner: Runner) -> Iterator[Figure]:
    """Time a step of six styles of the built-in model, with new noise, at the paper's batch and at the default."""
    for batch_size in (1, SepMEConfig().batch_size):
        yield joint_steps(runner, BANKED_STYLES[:_SIX], batch_size)


def joint_steps(runner: Runner, styles: Sequence[str], batch_size: int) -> Figure:
    """Time a joint step of these styles against a step of each.

    Args:
        runner: Says where and how often.
        styles: What is trained.
        batch_size: Pictures of each style in a step.
    """
    config = SepMEConfig.paper(batch_size=batch_size, n_images=batch_size, image_steps=1)
    learners = [learner(runner, style, config) for style in styles]
    groups = {"joint": [learners], "separate": [[one] for one in learners]}
    optimizers = {one.name: torch.optim.Adam(one.factors.values(), lr=0.0) for one in learners}
    optimizers["joint"] = torch.optim.Adam([f for one in learners for f in one.factors.values()], lr=0.0)

    def steps(kind: str) -> None:
        for group in groups[kind]:
            optimizer = optimizers["joint" if kind == "joint" else group[0].name]
            take_step(runner.small.unet, group, group, optimizer, config)

    acts = {kind: partial(steps, kind) for kind in groups}
    taken = runner.take_turns(acts, 1 + runner.repeats)
    pairs = list(zip(taken["joint"], taken["separate"], strict=True))[1:]  # the first ones warm up
    ratio = statistics.median(joint / separate for joint, separate in pairs)
    joint, separate = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    detail = f"{joint:.2f} s against {separate:.2f} s, built-in model"
    return Figure(f"a joint step of {len(styles)} concepts at batch {batch_size}", f"{ratio:.2f} x", detail)


def learner(runner: Runner, style: str, config: SepMEConfig) -> Learner:
    """Prepare a style, guarded on the blank prompt; its pictures are drawn."""
    pipe, concept = runner.small, Concept.paper(style)
    basis = config.beta * null_space(rows(encode(pipe, [BLANK])))
    pictures = NoisyPictures(pipe, concept, config, Encoded(pipe))
    return Learner(style, basis, projection_weights(pipe.unet), pictures, config)
