"""What the measurements of `bench` share: pipelines that are built when first needed, and timing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sepme_diffusers import pocket
from sepme_diffusers.evaluation.bench.shapes import sd15_shape
from sepme_diffusers.runtime.pipeline import SepMEPipeline


@dataclass(frozen=True)
class Result:
    """One row: what was measured, the bar, the figure with its unit, and what it is made of."""

    measure: str
    bar: str
    figure: str
    detail: str


class Workbench:
    """Where and how often is measured; a pipeline is built when the first measure that needs it runs.

    Args:
        device: Where the pipelines are.
        dtype: Of their weights.
        repeats: Pairs of timings for each ratio.
        steps: Denoising steps a timing.
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

    def _seconds(self, act: Callable[[], Any]) -> float:
        self._wait()
        started = time.perf_counter()
        act()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def peak_resident() -> int:
    """The most memory that this process has had in RAM, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss, which on Linux a process inherits from the one that starts it.
        held = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(held.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
