"""The runner of the benchmarks: the pipelines that are measured, and how they are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from sepme_diffusers import pocket
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.bench.shapes import sd15_shape
from sepme_diffusers.runtime.pipeline import SepMEPipeline


class Runner:
    """Says where and how often is measured. A pipeline is built when the first measure that needs it runs.

    Args:
        device: Where the pipelines are.
        dtype: Of their weights.
        repeats: Pairs of timings for each ratio.
        steps: Denoising steps per timing.
    """

    def __init__(
        self, device: str = "cpu", dtype: torch.dtype = torch.float32, repeats: int = 5, steps: int = 1
    ) -> None:
        self.device, self.dtype, self.repeats, self.steps = torch.device(device), dtype, repeats, steps

    @cached_property
    def large(self) -> SepMEPipeline:
        """A pipeline of Stable Diffusion 1.5's true shape."""
        return sd15_shape(self.dtype).to(self.device)

    @cached_property
    def small(self) -> SepMEPipeline:
        """The built-in model."""
        pipe = SepMEPipeline.from_pretrained(pocket.path()).to(self.device, self.dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def free_large(self) -> None:
        """Free the memory of the large pipeline; it is built again when it is needed."""
        vars(self).pop("large", None)

    def seconds(self, act: Callable[[], Any]) -> float:
        """Time a call, with all work on the device."""
        self.wait()
        started = time.perf_counter()
        act()
        self.wait()
        return time.perf_counter() - started

    def median_seconds(self, act: Callable[[], Any]) -> float:
        """Take the median time of `repeats` calls, after one that warms up."""
        act()
        return statistics.median(self.seconds(act) for _ in range(self.repeats))

    def take_turns(self, acts: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        """Time calls that take turns, so that what else the machine does falls on all of them: seconds by name.

        Args:
            acts: The calls by name; each goes first as often as last.
            rounds: How often.
        """
        taken: dict[str, list[float]] = {name: [] for name in acts}
        for index in range(rounds):
            for name in list(acts) if index % 2 == 0 else list(reversed(list(acts))):
                taken[name].append(self.seconds(acts[name]))
        return taken

    def wait(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


@contextmanager
def loaded(pipe: SepMEPipeline, bank: ConceptBank, **options: Any) -> Iterator[None]:
    """Load a bank while the block runs, with options of `load_sepme`."""
    pipe.load_sepme(bank, **options)
    try:
        yield
    finally:
        pipe.unload_sepme()
