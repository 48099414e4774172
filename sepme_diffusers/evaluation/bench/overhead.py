"""What our own code takes of a call, timed as parts: too little to be seen in the time of the whole."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.guard_readings import MOST_PROMPTS
from sepme_diffusers.evaluation.bench.denoising import plain_twin
from sepme_diffusers.evaluation.bench.measure import Figure, measure
from sepme_diffusers.evaluation.bench.runner import Runner, loaded
from sepme_diffusers.evaluation.bench.synthetic import alike_prompts, synthetic_bank
from sepme_diffusers.runtime.active import ActiveSet
from sepme_diffusers.runtime.erasures import Erasures, erasures_of
from sepme_diffusers.runtime.pipeline import SepMEPipeline
from sepme_diffusers.runtime.text_check import EVERY, TextCheck
from sepme_diffusers.text.encoding import encode

_CALL = 20
"""Steps of a call."""


@measure("<= 0.005", "a pass of the UNet without hooks")
def hooks_50_of_50(runner: Runner) -> Iterator[Figure]:
    """Time what runs in our hooks in a step, against a step without hooks.

    A step is one pass of the UNet on a batch of two, as guidance has it. Passes with 50 concepts active of 50 take
    turns with passes of the same weights without hooks. In the first kind every call of one of our hooks is timed,
    with its work on the device (which is waited for before and after), and the seconds of a pass are added up: of a
    call's first step, which edits the text, and of a later one, which finds it edited. The figure is the mean over a
    call of 20 steps of the medians of these sums, over the median of the passes without hooks. On a GPU it is an upper
    bound: what a hook hands to the device would otherwise run beside other work.
    """
    for form in ("text", "module"):
        yield _hooks(runner, synthetic_bank(runner.large, 50, form), form)


@measure("<= 1 %", f"{_CALL} passes of the UNet")
def text_check(runner: Runner) -> Iterator[Figure]:
    """Time what the check of the text encoder takes of a call of 20 steps.

    Every call compares samples of the encoder's weights and the tokenizer's ids with those of the call before; the
    first call and every 50th encode guard prompts, 16 of them at most and here. The figure is what a call takes of it
    on average: the comparing, and a fiftieth of the encoding. A step is one pass of the UNet on a batch of two.
    """
    pipe = runner.large
    bank = synthetic_bank(pipe, 50, "text", alike_prompts(pipe, MOST_PROMPTS))
    known, keys = TextCheck({"bank": bank}), [("bank", name) for name in bank]
    with loaded(pipe, bank), torch.no_grad():
        pipe.set_erased(list(bank))
        acts: dict[str, Callable[[], Any]] = {
            "first": lambda: TextCheck({"bank": bank}).least(pipe, keys),
            "next": lambda: known.least(pipe, keys),
            "all": pipe.check_erased,
            "step": one_pass(runner, pipe, plain_twin(pipe).unet),
        }
        for warm_up in acts.values():
            warm_up()
        taken = runner.take_turns(acts, runner.repeats)
    first, following, checks, step = (statistics.median(taken[name]) for name in acts)
    per_call = following + (first - following) / EVERY
    detail = (
        f"{1e3 * following:.2f} ms in every call, {1e3 * first:.1f} ms in the first and every {EVERY}th "
        f"({len(known.prompts)} prompts encoded); all checks of a call {1e3 * checks:.2f} ms; a step {step:.3f} s"
    )
    yield Figure("check of the text encoder, share of a call", f"{100 * per_call / (_CALL * step):.3f} %", detail)


def _hooks(runner: Runner, bank: ConceptBank, form: str) -> Figure:
    pipe = runner.large
    sums: dict[str, list[float]] = {"first": [], "later": []}
    # Passes outside a call run under the standing set.
    with loaded(pipe, bank, plain_pipelines="standing"), torch.no_grad():
        pipe.set_erased(list(bank))
        standing = cast(ActiveSet, cast(Erasures, erasures_of(pipe.unet)).standing)
        with timed_hooks(runner, pipe) as seconds:
            ours = one_pass(runner, pipe, pipe.unet)

            def both_steps() -> None:
                standing.forget()
                for step in ("first", "later"):
                    seconds.clear()
                    ours()
                    sums[step].append(sum(seconds))

            acts = {"ours": both_steps, "plain": one_pass(runner, pipe, plain_twin(pipe).unet)}
            for warm_up in acts.values():
                warm_up()
            sums["first"].clear()
            sums["later"].clear()
            taken = runner.take_turns(acts, runner.repeats)
    first, later, step = (statistics.median(times) for times in (*sums.values(), taken["plain"]))
    share = (first + (_CALL - 1) * later) / _CALL / step
    detail = (
        f"{1e3 * first:.2f} ms in the first step, {1e3 * later:.2f} ms in the others, in {len(seconds)} calls of "
        f"hooks; a step {step:.3f} s, {runner.repeats} pairs"
    )
    return Figure(f"in our hooks, share of a step: 50 active of 50, {form} form", f"{share:.5f}", detail)


def one_pass(runner: Runner, pipe: SepMEPipeline, unet: nn.Module) -> Callable[[], Any]:
    """Give a pass of a UNet, the pipeline's own or a twin, on a batch of two: what guidance asks for in a step."""
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    draw = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, channels, size, size, generator=draw).to(runner.device, runner.dtype)
    text = encode(pipe, ["a cat in the style of c0", ""]).to(runner.dtype)
    at = torch.tensor(500, device=runner.device)
    return lambda: unet(noisy, at, encoder_hidden_states=text)


@contextmanager
def timed_hooks(runner: Runner, pipe: SepMEPipeline) -> Iterator[list[float]]:
    """While the block runs, note the seconds of every call of a hook that a pipeline's erasures act by, in order.

    Args:
        runner: Waits for the device before and after each call.
        pipe: A pipeline with a loaded bank.
    """
    attachments = cast(Erasures, erasures_of(pipe.unet)).attachments
    seconds: list[float] = []
    tables = [table for module in pipe.unet.modules() for table in (module._forward_pre_hooks, module._forward_hooks)]
    ours = [
        (table, key, hook)
        for table in tables
        for key, hook in table.items()
        if getattr(hook, "attachment", None) in attachments
    ]
    for table, key, hook in ours:
        table[key] = _Timed(hook, runner, seconds)
    try:
        yield seconds
    finally:
        for table, key, hook in ours:
            table[key] = hook


class _Timed:
    """A hook that is timed."""

    def __init__(self, hook: Callable[..., Any], runner: Runner, seconds: list[float]) -> None:
        self.hook, self.runner, self.seconds = hook, runner, seconds

    def __call__(self, *arguments: Any) -> Any:
        self.runner.wait()
        started = time.perf_counter()
        result = self.hook(*arguments)
        self.runner.wait()
        self.seconds.append(time.perf_counter() - started)
        return result
