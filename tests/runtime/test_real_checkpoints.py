"""Every step from prompts to an erased picture on real base models: true architectures and sizes, random weights.

Training and drawing are at 128 x 128 pixels: the weights do not depend on the picture's size, time and memory do.
Each case runs in a process of its own, whose peak of resident memory is logged (`--log-cli-level=INFO` shows it).
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sepme_diffusers import Concept, ConceptBank, SepMEConfig, SepMEPipeline, SepMETrainer
from sepme_diffusers.evaluation.bench import shapes
from sepme_diffusers.evaluation.bench.processes import alone as in_a_process
from sepme_diffusers.evaluation.bench.processes import peak_resident
from sepme_diffusers.interchange.checkpoint import single_file_tensors
from sepme_diffusers.text.encoding import encode

pytestmark = pytest.mark.slow

LATENT = 16
CLOSED = SepMEConfig.linear(rank=8)
TWO_STEPS = {"batch_size": 1, "n_images": 1, "image_steps": 1, "min_steps": 2, "max_steps": 2}


def draw(pipe: Any, prompt: str, **kwargs: object) -> torch.Tensor:
    """Latents after one step."""
    generator = torch.Generator().manual_seed(0)
    made = pipe(prompt, num_inference_steps=1, guidance_scale=4.0, generator=generator, output_type="latent", **kwargs)
    return made.images


def erases(pipe: Any) -> None:
    """Assert that "cat" is erased for its call alone, and neither "watermark" nor "dog" is touched by it."""
    original = draw(pipe, "cat")
    assert original.isfinite().all()
    assert not torch.equal(draw(pipe, "cat", erased=["cat"]), original)
    assert torch.equal(draw(pipe, "cat"), original)
    for guarded in ("watermark", "dog"):
        assert torch.equal(draw(pipe, guarded, erased=["cat"]), draw(pipe, guarded))


def made_and_used(shape: str, dtype: torch.dtype, width: int, folder: Path) -> None:
    """Encode, guard, closed form, two training steps, save, load, erase."""
    pipe = getattr(shapes, shape)(dtype, LATENT)
    assert encode(pipe, ["cat", ""]).shape == (2, 77, width)
    bank = SepMETrainer(pipe, CLOSED, guards=["watermark"]).erase([Concept("cat"), Concept("dog")])
    seen = []
    trainer = SepMETrainer(
        pipe, SepMEConfig.linear(solver="train", rank=8, **TWO_STEPS), ["watermark"], on_step=seen.append
    )
    bank = trainer.erase([Concept("fox")], bank)
    assert [step.step for step in seen] == [1, 2]
    assert 0 < seen[0].loss < float("inf")
    assert any(c.any() for c in bank["fox"].increment.C.values())
    assert all(entry.metrics["leakage"] < 1e-5 for entry in bank.values())
    bank.save_pretrained(folder, torch.float16)
    assert list(ConceptBank.from_pretrained(folder)) == ["cat", "dog", "fox"]
    pipe.load_sepme(folder)
    erases(pipe)
    assert not torch.equal(draw(pipe, "fox", erased=["fox"]), draw(pipe, "fox"))


def read_from_one_file(folder: Path) -> None:
    """Write Stable Diffusion 1.5's original single file, read it, erase."""
    source = shapes.sd15_shape(torch.bfloat16, LATENT)
    save_file(single_file_tensors(source), folder / "model.safetensors", {"format": "pt"})
    save_configs(source, folder / "configs")
    bank = SepMETrainer(source, CLOSED, guards=["watermark"]).erase([Concept("cat"), Concept("dog")])
    expected = draw(source, "cat")
    del source
    pipe = SepMEPipeline.from_single_file(
        str(folder / "model.safetensors"), config=str(folder / "configs"), safety_checker=None,
        local_files_only=True, torch_dtype=torch.bfloat16,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(pipe, "cat"), expected)
    pipe.load_sepme(bank)
    erases(pipe)


def save_configs(pipe: Any, folder: Path) -> None:
    """The pipeline's folder without weights."""
    pipe.save_config(folder)
    for name in ("unet", "vae", "scheduler"):
        getattr(pipe, name).save_config(folder / name)
    pipe.text_encoder.config.save_pretrained(folder / "text_encoder")
    pipe.tokenizer.save_pretrained(folder / "tokenizer")


def measured(act: Callable[..., None], *args: object) -> str:
    """What a process that does nothing else takes for it."""
    started = time.perf_counter()
    act(*args)
    return f"peak {peak_resident() / 1e9:.1f} GB, {time.perf_counter() - started:.0f} s"


def alone(act: Callable[..., None], *args: object) -> None:
    taken = in_a_process(measured, act, *args)
    logging.getLogger(__name__).info("%s %s: %s", act.__name__, args[:2], taken)


@pytest.mark.parametrize(
    ("shape", "dtype", "width"),
    [
        ("sd15_shape", torch.float32, 768),
        ("sd21_shape", torch.float32, 1024),
        ("sd15_shape", torch.bfloat16, 768),
        ("sdxl_shape", torch.bfloat16, 2048),
    ],
    ids=["sd15-float32", "sd21-float32", "sd15-bfloat16", "sdxl-bfloat16"],
)
def test_concepts_are_made_saved_loaded_and_erased(shape, dtype, width, tmp_path):
    alone(made_and_used, shape, dtype, width, tmp_path / "bank")


def test_a_single_file_of_stable_diffusion_is_read_and_erases(tmp_path):
    alone(read_from_one_file, tmp_path)
