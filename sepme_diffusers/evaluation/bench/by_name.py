"""What it takes to erase what a user names: the whole call, at Stable Diffusion 1.5's shape."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence

import torch

from sepme_diffusers.evaluation.bench.measure import Figure, measure
from sepme_diffusers.evaluation.bench.processes import alone, peak_resident, resident
from sepme_diffusers.evaluation.bench.runner import Runner
from sepme_diffusers.evaluation.bench.shapes import sd15_text_shape
from sepme_diffusers.making.regular import CACHE
from sepme_diffusers.making.trainer import SepMETrainer

# Styles with second names of their own.
FIRST, SECOND, IN_ANOTHER_PROCESS = "Van Gogh", "Hokusai", "Rembrandt"


@measure("<= 60 s a concept after the first, <= 2 GB", "nothing: a bar in seconds and GB", on_request=True)
def by_name(runner: Runner) -> Iterator[Figure]:
    """Erase styles by their names, with nothing else given and no denoiser, from nothing kept to a bank."""
    runner.free_large()
    device = str(runner.device)
    with tempfile.TemporaryDirectory() as folder:
        taken = alone(erase_named, folder, [FIRST, SECOND], device, runner.dtype)
        later = alone(erase_named, folder, [IN_ANOTHER_PROCESS], device, runner.dtype)
    yield from figures(taken, later)


def erase_named(
    cache: str,
    names: Sequence[str],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    regular: int | None = None,
) -> dict[str, float]:
    """Erase styles one after the other, for a process that does nothing else.

    Args:
        cache: The folder for what is encoded of regular prompts.
        names: The styles.
        device: Where the text encoder is.
        dtype: Of its weights.
        regular: How many regular prompts there are. Default: as many as the trainer takes by itself.

    Returns:
        Seconds by name. And what the process had in memory at most beyond the text encoder, in bytes ("peak"), by how
        many regular prompts it was calibrated ("held_out"), and how many templates could not be read ("left_out").
    """
    os.environ[CACHE] = cache
    pipe = sd15_text_shape(dtype).to(device)
    taken, before = {}, resident()
    started, bank = time.perf_counter(), None
    trainer = SepMETrainer(pipe, regular=regular)
    for name in names:
        bank = trainer.erase([name], bank, kind="style")
        taken[name], started = time.perf_counter() - started, time.perf_counter()
    metrics = [entry.metrics for entry in bank.values()] if bank is not None else []
    return {
        **taken,
        "peak": float(peak_resident() - before),
        "held_out": max(said["regular_prompts"] for said in metrics),
        "left_out": sum(said.get("templates_left_out", 0) for said in metrics),
    }


def figures(taken: dict[str, float], later: dict[str, float]) -> Iterator[Figure]:
    """Give what `erase_named` took as figures.

    Args:
        taken: Of two names, from nothing kept.
        later: Of one more, in a process that finds what the other one encoded.
    """
    detail = (
        f"closed form, 768 x 77, threads: {torch.get_num_threads()}; the first concept {taken[FIRST]:.0f} s, for "
        f"which regular prompts are encoded ({taken['held_out']:.0f} of them to calibrate by); the first of another "
        f"process {later[IN_ANOTHER_PROCESS]:.0f} s; {taken['left_out']:.0f} templates left out"
    )
    yield Figure("the second concept, from its name to its entry", f"{taken[SECOND]:.0f} s", detail)
    peak = max(taken["peak"], later["peak"])
    yield Figure("memory of erasing by name", f"{peak / 1e9:.2f} GB", "peak of the process beyond the text encoder")
