"""Speed and memory, as ratios in one run against a stated baseline.

At Stable Diffusion 1.5's true shape (random weights: speed does not depend on them) and on the built-in model.
Baseline and ours take turns, so that what else the machine does falls on both; a ratio is the median of the pairs'.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from sepme_diffusers import pocket
from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.doors.linears import projection_shapes, projection_weights
from sepme_diffusers.evaluation.bench.making import Making
from sepme_diffusers.evaluation.bench.runner import Result
from sepme_diffusers.evaluation.report import Table
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.runtime.erasures import erasures_of
from sepme_diffusers.runtime.pipeline import SepMEPipeline
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import encode, rows

RANK = 8


class Bench(Making):
    """The measurements, each a method: those at inference, and those of `Making`."""

    def loop_50_of_50(self) -> Iterator[Result]:
        """The denoising loop with 50 concepts active of 50 loaded."""
        for form in ("text", "module"):
            bank = synthetic_bank(self.large, 50, form)
            yield self._loop(self.large, bank, list(bank), f"50 active of 50, {form} form", "<= 1.01")

    def loop_20_of_1000(self) -> Iterator[Result]:
        """The denoising loop with 20 concepts active of 1,000 loaded."""
        bank = synthetic_bank(self.large, 1000, "text")
        yield self._loop(self.large, bank, list(bank)[::50], "20 active of 1,000, text form", "<= 1.02")

    def loop_built_in(self) -> Iterator[Result]:
        """The denoising loop of the built-in model with 10 concepts active of 110 loaded."""
        banks = {name: pocket.bank(name) for name in ("styles", "objects")}
        bank = banks["styles"].with_entries(banks["objects"].values())
        erased = [*list(banks["styles"])[:5], *list(banks["objects"])[:5]]
        yield self._loop(self.small, bank, erased, "built-in model, 10 active of 110", "<= 1.10", more=20)

    def mixed_batch(self) -> Iterator[Result]:
        """Eight prompts, each with an erased set of its own."""
        bank = synthetic_bank(self.large, 50, "text")
        sets = [list(bank)[6 * index : 6 * index + 6] for index in range(8)]
        what = "8 prompts, 8 erased sets, of 50 loaded"
        yield self._loop(self.large, bank, sets, what, "<= 1.02", prompts=8)

    def switching(self) -> Iterator[Result]:
        """Another erased set, against another set of PEFT adapters."""
        pipe, names = self.large, [f"c{index}" for index in range(50)]
        sets = [names[start : start + 25] for start in range(25)]
        with self._loaded(pipe, synthetic_bank(pipe, 50, "module")):
            ours = [self._seconds(lambda chosen=chosen: pipe.set_erased(chosen)) for chosen in sets[:1] + sets]
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(projection_shapes(pipe.unet)))
        for name in names:
            pipe.unet.add_adapter(config, name)
        theirs = [self._seconds(lambda chosen=chosen: pipe.set_adapters(chosen)) for chosen in sets]
        pipe.unload_lora_weights()
        fast, slow = statistics.median(ours[1:]), statistics.median(theirs)
        detail = f"{1e6 * fast:.0f} us against {1e3 * slow:.1f} ms of set_adapters, 25 of 50"
        yield Result("switching the erased set", ">= 100 x faster", f"{slow / fast:.0f} x", detail)

    def memory(self) -> Iterator[Result]:
        """What 100 loaded concepts take, in float16, and what 20 active ones add."""
        for form in ("text", "module"):
            bank = half(synthetic_bank(self.large, 100, form))
            with self._loaded(self.large, bank):
                loaded = held(bank, self.large)
                self.large.set_erased(list(bank)[:20])
                active = held(bank, self.large)
            detail = f"with 20 of them active {active / 1e6:.1f} MB"
            yield Result(f"memory of 100 concepts, {form} form", "<= 50 MB", f"{loaded / 1e6:.1f} MB", detail)

    def loading(self) -> Iterator[Result]:
        """From a folder to erasable."""
        for form in ("text", "module"):
            with tempfile.TemporaryDirectory() as folder:
                synthetic_bank(self.large, 100, form).save_pretrained(Path(folder) / "bank", torch.float16)
                taken = []
                for _ in range(self.repeats):
                    taken.append(self._seconds(lambda path=folder: self.large.load_sepme(Path(path) / "bank")))
                    self.large.unload_sepme()
            yield Result(
                f"loading 100 concepts, {form} form", "<= 0.5 s", f"{statistics.median(taken):.2f} s",
                "load_sepme(folder): reading, hashes, checks against the pipeline",
            )  # fmt: skip

    def disk(self) -> Iterator[Result]:
        """What a concept takes on disk: compact, and with A in float32 and the rest in float16."""
        for form, bar in (("text", "<= 32 KB"), ("module", "<= 420 KB")):
            bank = synthetic_bank(self.large, 10, form)
            sizes = [sizes_on_disk(one) for one in (bank.compact(), bank)]
            (tensors, whole), (wide, _) = sizes
            yield Result(
                f"a concept on disk, {form} form", bar, f"{tensors / 1e3:.1f} KB",
                f"the tensor file of a compact bank, rank {RANK}; the whole folder of 10 concepts: {whole / 10e3:.1f} "
                f"KB a concept; not compact{' (a PEFT LoRA)' if form == 'module' else ''}: {wide / 1e3:.1f} KB",
            )  # fmt: skip

    def compiling(self) -> Iterator[Result]:
        """Graphs that torch.compile makes anew over 20 changes of the erased set."""
        pipe = SepMEPipeline.from_pretrained(pocket.path()).to(self.device, self.dtype)
        pipe.set_progress_bar_config(disable=True)
        for name in ("styles", "objects"):
            pipe.load_sepme(pocket.bank(name), name=name)
        pipe.unet = torch.compile(pipe.unet)
        statistics_of = torch._dynamo.utils.counters["stats"]
        pipe("a cat", num_inference_steps=1, output_type="latent")
        before = statistics_of["unique_graphs"]
        for size in range(20):
            pipe.set_erased(pipe.erasable[size : 2 * size])
            pipe("a cat", num_inference_steps=1, output_type="latent")
        anew = statistics_of["unique_graphs"] - before
        torch.compiler.reset()
        yield Result("recompilations over 20 changes", "0", str(anew), f"{before} graphs at first; 110 loaded")

    def _loop(
        self, pipe: SepMEPipeline, bank: ConceptBank, erased: list[Any], what: str, bar: str, prompts: int = 1,
        more: int = 1,
    ) -> Result:  # fmt: skip
        embeds = encode(pipe, ["a cat in the style of c0"] * prompts).to(self.dtype)
        settings = {
            "prompt_embeds": embeds, "negative_prompt_embeds": encode(pipe, [""] * prompts).to(self.dtype),
            "num_inference_steps": self.steps * more, "guidance_scale": 4.0, "output_type": "latent",
        }  # fmt: skip
        chosen = {"erased": erased} if isinstance(erased[0], list) else {}
        bare, ratios, plain = bare_twin(pipe), [], []
        turns = {"plain": lambda: bare(**settings), "ours": lambda: pipe(**settings, **chosen)}
        with self._loaded(pipe, bank):
            pipe.set_erased([] if chosen else erased)
            for turn in turns.values():
                turn()
            for index in range(self.repeats * min(more, 4)):
                # Each goes first as often as second.
                order = list(turns) if index % 2 == 0 else list(reversed(turns))
                taken = {name: self._seconds(turns[name]) for name in order}
                plain.append(taken["plain"])
                ratios.append(taken["ours"] / taken["plain"])
        ratios.sort()
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        detail = f"quartiles {low:.3f} to {high:.3f} of {len(ratios)} pairs; plain {statistics.median(plain):.2f} s"
        return Result(f"denoising: {what}", bar, f"{statistics.median(ratios):.3f} x", detail)

    @contextmanager
    def _loaded(self, pipe: SepMEPipeline, bank: ConceptBank) -> Iterator[None]:
        pipe.load_sepme(bank)
        try:
            yield
        finally:
            pipe.unload_sepme()


MEASURES = tuple(name for kind in (Bench, Making) for name in vars(kind) if not name.startswith("_"))


def run(bench: Bench, only: tuple[str, ...] = (), on_measure: Callable[[str], None] | None = None) -> Iterator[Result]:
    """The measurements, each when it is made, so that one that fails loses none before it.

    Args:
        bench: Where and how often.
        only: Names out of `MEASURES`. Default: all.
        on_measure: Called with the name of each before it starts.

    Raises:
        ValueError: On a name that is none of them, before any is made.
    """
    if unknown := [name for name in only if name not in MEASURES]:
        raise ValueError(f"unknown measures {unknown}; there are {list(MEASURES)}")
    return _each(bench, only or MEASURES, on_measure)


def _each(bench: Bench, names: tuple[str, ...], on_measure: Callable[[str], None] | None) -> Iterator[Result]:
    for name in names:
        if on_measure is not None:
            on_measure(name)
        yield from getattr(bench, name)()


def table(bench: Bench, results: Iterable[Result]) -> Table:
    """The measurements as a table."""
    cells = tuple((one.measure, one.bar, one.figure, one.detail) for one in results)
    return Table(f"Speed and memory on {bench.device}, {bench.dtype}", ("", "bar", "measured", "detail"), cells)


def bare_twin(pipe: SepMEPipeline) -> StableDiffusionPipeline:
    """The plain pipeline with the same weights in memory, on modules without hooks."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict(), assign=True)
    twin = StableDiffusionPipeline(**{**pipe.components, "unet": unet.eval()}, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    return twin


def synthetic_bank(pipe: SepMEPipeline, size: int, form: str) -> ConceptBank:
    """A bank of small random increments in the blank prompt's null space: as fast and as large as real ones."""
    weights = projection_weights(pipe.unet)
    d = next(iter(weights.values())).shape[1]
    shapes = {name: (len(weight), float(weight.float().norm())) for name, weight in weights.items()}
    null = null_space(rows(encode(pipe, [""])).cpu()).float()
    draw = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> Tensor:
        return 1e-3 * torch.randn(*shape, generator=draw)

    def increment() -> Increment:
        a = factor(RANK, len(null)) @ null
        if form == "text":
            return Increment(a, B=factor(d, RANK))
        return Increment(a, C={name: factor(d_out, RANK) for name, (d_out, _) in shapes.items()})

    entries = [Entry(Concept(f"c{index}"), increment(), SepMEConfig(), ("",)) for index in range(size)]
    base = BaseModel("random weights", d, pipe.tokenizer.model_max_length, shapes)
    return ConceptBank(base).with_entries(entries)


def half(bank: ConceptBank) -> ConceptBank:
    """The bank as it comes back from `save_pretrained(dtype=torch.float16)`."""
    with tempfile.TemporaryDirectory() as folder:
        bank.save_pretrained(Path(folder) / "bank", torch.float16)
        return ConceptBank.from_pretrained(Path(folder) / "bank")


def sizes_on_disk(bank: ConceptBank) -> tuple[int, int]:
    """Bytes of the largest tensor file, and of the whole folder, B and C in float16."""
    with tempfile.TemporaryDirectory() as folder:
        bank.save_pretrained(Path(folder) / "bank", torch.float16)
        files = {path: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    return max(size for path, size in files.items() if path.suffix == ".safetensors"), sum(files.values())


def held(bank: ConceptBank, pipe: SepMEPipeline) -> int:
    """Bytes that the bank and what the pipeline stacked of it hold, each storage counted once."""
    tensors = [tensor for entry in bank.values() for tensor in entry.increment.tensors().values()]
    tensors += erasures_of(pipe.unet).tensors()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
