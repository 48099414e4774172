"""What another erased set costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch
from peft import LoraConfig

from sepme_diffusers import pocket
from sepme_diffusers.doors.linears import projection_shapes
from sepme_diffusers.evaluation.bench.measure import Figure, measure
from sepme_diffusers.evaluation.bench.runner import Runner, loaded
from sepme_diffusers.evaluation.bench.synthetic import RANK, synthetic_bank
from sepme_diffusers.runtime.pipeline import SepMEPipeline


@measure(">= 100 x faster", "set_adapters with as many PEFT adapters")
def switching(runner: Runner) -> Iterator[Figure]:
    """Time another erased set."""
    pipe, names = runner.large, [f"c{index}" for index in range(50)]
    sets = [names[start : start + 25] for start in range(25)]
    with loaded(pipe, synthetic_bank(pipe, 50, "module")):
        ours = [runner.seconds(partial(pipe.set_erased, names)) for names in sets[:1] + sets]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(projection_shapes(pipe.unet)))
    for name in names:
        pipe.unet.add_adapter(config, name)
    theirs = [runner.seconds(partial(pipe.set_adapters, names)) for names in sets]
    pipe.unload_lora_weights()
    fast, slow = statistics.median(ours[1:]), statistics.median(theirs)
    detail = f"{1e6 * fast:.0f} us against {1e3 * slow:.1f} ms of set_adapters, 25 of 50"
    yield Figure("switching the erased set", f"{slow / fast:.0f} x", detail)


@measure("0", "the graphs of the first call")
def compiling(runner: Runner) -> Iterator[Figure]:
    """Count the graphs that torch.compile makes anew over 20 changes of the erased set."""
    # Not the runner's: compiling changes a pipeline for whoever measures after.
    pipe = SepMEPipeline.from_pretrained(pocket.path()).to(runner.device, runner.dtype)
    pipe.set_progress_bar_config(disable=True)
    for name in ("styles", "objects"):
        pipe.load_sepme(pocket.bank(name), name=name)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True)
    counters = torch._dynamo.utils.counters["stats"]
    pipe("a cat", num_inference_steps=1, output_type="latent")
    before = counters["unique_graphs"]
    for size in range(20):
        pipe.set_erased(pipe.erasable[size : 2 * size])
        pipe("a cat", num_inference_steps=1, output_type="latent")
    anew = counters["unique_graphs"] - before
    torch.compiler.reset()
    yield Figure("recompilations over 20 changes", str(anew), f"{before} graphs at first; 110 loaded")
