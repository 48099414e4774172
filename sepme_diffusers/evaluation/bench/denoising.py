"""What erasures cost a denoising step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from sepme_diffusers import pocket
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.bench.measure import Figure, measure
from sepme_diffusers.evaluation.bench.runner import Runner, loaded
from sepme_diffusers.evaluation.bench.synthetic import synthetic_bank
from sepme_diffusers.runtime.pipeline import SepMEPipeline
from sepme_diffusers.text.encoding import encode

_PLAIN = "the plain pipeline with the same weights"


@measure("<= 1.01 x", _PLAIN)
def loop_50_of_50(runner: Runner) -> Iterator[Figure]:
    """Time the denoising loop with 50 concepts active of 50 loaded."""
    for form in ("text", "module"):
        bank = synthetic_bank(runner.large, 50, form)
        yield _loop(runner, runner.large, bank, list(bank), f"50 active of 50, {form} form")


@measure("<= 1.02 x", _PLAIN)
def loop_20_of_1000(runner: Runner) -> Iterator[Figure]:
    """Time the denoising loop with 20 concepts active of 1,000 loaded."""
    bank = synthetic_bank(runner.large, 1000, "text")
    yield _loop(runner, runner.large, bank, list(bank)[::50], "20 active of 1,000, text form")


@measure("<= 1.10 x", _PLAIN)
def loop_built_in(runner: Runner) -> Iterator[Figure]:
    """Time the denoising loop of the built-in model with 10 concepts active of 110 loaded."""
    banks = {name: pocket.bank(name) for name in ("styles", "objects")}
    bank = banks["styles"].with_entries(banks["objects"].values())
    erased = [*list(banks["styles"])[:5], *list(banks["objects"])[:5]]
    yield _loop(runner, runner.small, bank, erased, "built-in model, 10 active of 110", fast=True)


@measure("<= 1.02 x", _PLAIN)
def mixed_batch(runner: Runner) -> Iterator[Figure]:
    """Time the denoising loop with eight prompts, each with an erased set of its own."""
    bank = synthetic_bank(runner.large, 50, "text")
    sets = [list(bank)[6 * index : 6 * index + 6] for index in range(8)]
    yield _loop(runner, runner.large, bank, sets, "8 prompts, 8 erased sets, of 50 loaded", prompts=8)


def _loop(
    runner: Runner, pipe: SepMEPipeline, bank: ConceptBank, erased: Sequence[str] | Sequence[list[str]], what: str,
    prompts: int = 1, fast: bool = False,
) -> Figure:  # fmt: skip
    """Time a loop with erasures against the same loop without: the median ratio of pairs.

    Args:
        runner: Says how often.
        pipe: The pipeline that is measured.
        bank: What is loaded on it.
        erased: One set for all prompts, or one per prompt.
        what: What is measured.
        prompts: How many.
        fast: Whether the model is: then calls have 20 steps at least, and are timed four times as often.
    """
    settings = {
        "prompt_embeds": encode(pipe, ["a cat in the style of c0"] * prompts).to(runner.dtype),
        "negative_prompt_embeds": encode(pipe, [""] * prompts).to(runner.dtype),
        "num_inference_steps": max(runner.steps, 20 if fast else 1), "guidance_scale": 4.0, "output_type": "latent",
    }  # fmt: skip
    plain, per_prompt = plain_twin(pipe), isinstance(erased[0], list)
    chosen = {"erased": erased} if per_prompt else {}
    acts: dict[str, Callable[[], Any]]
    acts = {"plain": lambda: plain(**settings), "ours": lambda: pipe(**settings, **chosen)}
    with loaded(pipe, bank):
        pipe.set_erased([] if per_prompt else cast(Sequence[str], erased))
        for warm_up in acts.values():
            warm_up()
        taken = runner.take_turns(acts, runner.repeats * (4 if fast else 1))
    ratios = sorted(ours / theirs for ours, theirs in zip(taken["ours"], taken["plain"], strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    seconds = statistics.median(taken["plain"])
    detail = f"quartiles {low:.3f} to {high:.3f} of {len(ratios)} pairs; plain {seconds:.2f} s"
    return Figure(f"denoising: {what}", f"{statistics.median(ratios):.3f} x", detail)


def plain_twin(pipe: SepMEPipeline) -> StableDiffusionPipeline:
    """Make the plain pipeline with the same weights in memory, on modules without hooks."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict(), assign=True)
    twin = StableDiffusionPipeline(**{**pipe.components, "unet": unet.eval()}, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    return twin
