"""What banks take: memory, time to load, and space on disk."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import torch

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.bench.measure import Figure, measure
from sepme_diffusers.evaluation.bench.runner import Runner, loaded
from sepme_diffusers.evaluation.bench.synthetic import RANK, in_half_precision, sizes_on_disk, synthetic_bank
from sepme_diffusers.runtime.erasures import Erasures, erasures_of
from sepme_diffusers.runtime.pipeline import SepMEPipeline


@measure("<= 50 MB", "nothing loaded")
def memory(runner: Runner) -> Iterator[Figure]:
    """Count what 100 loaded concepts take, in float16, and what 20 active ones add."""
    for form in ("text", "module"):
        bank = in_half_precision(synthetic_bank(runner.large, 100, form))
        with loaded(runner.large, bank):
            idle = held(bank, runner.large)
            runner.large.set_erased(list(bank)[:20])
            snapshot = cast(Erasures, erasures_of(runner.large.unet)).snapshot
            snapshot.active([snapshot.standing])  # what the first call stacks
            active = held(bank, runner.large)
        detail = f"with 20 of them active {active / 1e6:.1f} MB"
        yield Figure(f"memory of 100 concepts, {form} form", f"{idle / 1e6:.1f} MB", detail)


@measure("<= 0.5 s", "nothing loaded")
def loading(runner: Runner) -> Iterator[Figure]:
    """Time the way from a folder to what can be erased."""
    for form in ("text", "module"):
        with tempfile.TemporaryDirectory() as folder:
            synthetic_bank(runner.large, 100, form).save_pretrained(Path(folder) / "bank", torch.float16)
            taken = []
            for _ in range(runner.repeats):
                taken.append(runner.seconds(partial(runner.large.load_sepme, Path(folder) / "bank")))
                runner.large.unload_sepme()
        detail = "load_sepme(folder): reading, hashes, checks against the pipeline"
        yield Figure(f"loading 100 concepts, {form} form", f"{statistics.median(taken):.2f} s", detail)


@measure("<= 32 KB", "an empty bank")
def disk_text(runner: Runner) -> Iterator[Figure]:
    """Count what a text-side concept takes on disk: compact, and with A in float32 and the rest in float16."""
    yield _on_disk(synthetic_bank(runner.large, 10, "text"), "text", "not compact")


@measure("<= 420 KB", "an empty bank")
def disk_module(runner: Runner) -> Iterator[Figure]:
    """Count what a per-module concept takes on disk, compact and as a PEFT LoRA."""
    yield _on_disk(synthetic_bank(runner.large, 10, "module"), "module", "not compact (a PEFT LoRA)")


@measure("<= 1 s, <= 1 MB each", "the same bank without adapters")
def adapters(runner: Runner) -> Iterator[Figure]:
    """Time what PEFT adapters of 100 text-side concepts add to a save, and count what they take."""
    bank, pipe = synthetic_bank(runner.large, 100, "text"), runner.large
    with tempfile.TemporaryDirectory() as folder:
        without, having = Path(folder) / "without", Path(folder) / "with"
        bare = runner.seconds(lambda: bank.save_pretrained(without, adapters=False))
        whole = runner.seconds(lambda: bank.save_pretrained(having, adapters=True, base=pipe))
        again = runner.seconds(lambda: bank.save_pretrained(having))
        size = sum(file.stat().st_size for file in having.glob("*/adapter_*")) / len(bank)
    detail = (
        f"saving 100 concepts: {bare:.2f} s without, {whole:.2f} s with, {again:.2f} s again; rank {RANK}, float16"
    )
    value = f"{(whole - bare) / len(bank):.3f} s, {size / 1e6:.2f} MB"
    yield Figure("the PEFT adapter of a concept, text form", value, detail)


def _on_disk(bank: ConceptBank, form: str, otherwise: str) -> Figure:
    (compact, whole), (wide, _) = sizes_on_disk(bank.compact()), sizes_on_disk(bank)
    detail = (
        f"tensors of a compact bank, rank {RANK}; with everything else in the folder of {len(bank)} concepts: "
        f"{whole / 1e3:.1f} KB per concept; {otherwise}: {wide / 1e3:.1f} KB"
    )
    return Figure(f"a concept on disk, {form} form", f"{compact / 1e3:.1f} KB", detail)


def held(bank: ConceptBank, pipe: SepMEPipeline) -> int:
    """Count the bytes of a bank and of what the pipeline stacked of it, each storage once."""
    tensors = [tensor for entry in bank.values() for tensor in entry.increment.tensors().values()]
    tensors += cast(Erasures, erasures_of(pipe.unet)).tensors()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
