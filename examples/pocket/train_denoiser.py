"""Train the text encoder and the UNet together, or train a second UNet on from the first.

    python examples/pocket/train_denoiser.py
    python examples/pocket/train_denoiser.py --variant

Resumable: run it again after an interruption and it goes on from the last checkpoint.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from rasterise import CLASSES
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sepme_diffusers.pocket.judge import Judge
from sepme_diffusers.pocket.vocabulary import OBJECTS, WATERMARK
from text import WIDTH, caption, contrast, encoder, tokenize, tokenizer, training_pairs

EVERY = 500  # steps between checkpoints


def scheduler() -> DDIMScheduler:
    """Noise schedule of the built-in model: v-prediction, zero terminal signal, trailing steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def denoiser() -> UNet2DConditionModel:
    """An untrained UNet on 16 x 16 latents with text attention at 16 and 8."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 80, 96),
        layers_per_block=1,
        attention_head_dim=2,  # heads
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
    )


class Data:
    """Batches of latents with their captions; `weights` says how often each style class is drawn."""

    def __init__(self, work: Path, seed: int, weights: dict[str, float] | None = None) -> None:
        drawn = load_file(work / "latents.safetensors")
        self.latents, self.watermark = drawn["latents"], drawn["watermark"]
        self.rng, self.pairs, self.objects = random.Random(seed), training_pairs(), list(OBJECTS)
        self.weights = [(weights or {}).get(CLASSES[style], 1.0) for style, _ in self.pairs]

    def batch(self, size: int) -> tuple[Tensor, list[str]]:
        """Latents (size, 4, 16, 16) and captions."""
        latents, captions = [], []
        for style, object_ in self.rng.choices(self.pairs, self.weights, k=size):
            if self.rng.random() < 0.01:
                latents.append(self.watermark)
                captions.append(WATERMARK)
            else:
                latents.append(self.latents[style, object_, self.rng.randrange(self.latents.shape[2])])
                captions.append(caption(CLASSES[style], self.objects[object_], self.rng))
        return torch.stack(latents), captions


def velocity_loss(unet: UNet2DConditionModel, noise: DDIMScheduler, latents: Tensor, states: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity, weighted by min-SNR 5 (arXiv 2303.09556)."""
    eps, steps = torch.randn_like(latents), torch.randint(noise.config.num_train_timesteps, (len(latents),))
    noisy = noise.add_noise(latents, eps, steps).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(noisy, steps, states).sample
    snr = compute_snr(noise, steps)
    errors = F.mse_loss(predicted.float(), noise.get_velocity(latents, eps, steps), reduction="none").mean((1, 2, 3))
    return (errors * snr.clamp(max=5) / (snr + 1) * 2).mean()


@torch.no_grad()
def picture_features(work: Path) -> Tensor:
    """The judge's pooled features of the real pictures, (styles, objects, d), from the first view of each."""
    pictures = load_file(work / "pictures.safetensors")["pictures"][:, :, 0]
    judge = Judge(len(CLASSES), len(OBJECTS)).eval()
    judge.load_state_dict(load_file(work / "judge.safetensors"))
    images = pictures.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    features = torch.cat([torch.cat(judge.pooled(part), dim=1) for part in images.split(128)])
    return features.unflatten(0, pictures.shape[:2])


def text_parts(work: Path, seed: int) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and the text encoder pretrained against the pictures; made once."""
    if not (work / "text_encoder").exists():
        tokens = tokenizer()
        torch.manual_seed(seed)
        text = encoder(len(tokens))
        contrast(text, tokens, picture_features(work), steps=400, seed=seed)
        tokens.save_pretrained(work / "tokenizer")
        text.save_pretrained(work / "text_encoder")
    return CLIPTokenizer.from_pretrained(work / "tokenizer"), CLIPTextModel.from_pretrained(work / "text_encoder")


class Run:
    """Everything that changes during training, with its checkpoint file."""

    def __init__(
        self, unet: UNet2DConditionModel, text: CLIPTextModel, train_text: bool, lr: float, file: Path
    ) -> None:
        self.unet, self.text, self.file, self.step, self.lr = unet, text, file, 0, lr
        groups: list[dict[str, Any]] = [{"params": list(unet.parameters()), "scale": 1.0}]
        if train_text:
            groups.append({"params": list(text.parameters()), "scale": 0.25})
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.parameters = [p for group in groups for p in group["params"]]
        self.ema = EMAModel(self.parameters, decay=0.999, use_ema_warmup=True, power=0.75)
        if file.exists():
            state = torch.load(file, weights_only=True)
            self.step = state["step"]
            self.unet.load_state_dict(state["unet"])
            self.text.load_state_dict(state["text"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        state = {"step": self.step, "unet": self.unet.state_dict(), "text": self.text.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "ema": self.ema.state_dict()}
        torch.save(state, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)

    def update(self, loss: Tensor, steps: int) -> None:
        """One optimizer step: warm up over 200 steps, hold, fall to zero over the last third."""
        rate = min(1.0, (self.step + 1) / 200, 3 * (steps - self.step) / steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate * group["scale"]
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.step(self.parameters)
        self.step += 1


def train(run: Run, data: Data, tokens: CLIPTokenizer, steps: int, batch: int) -> None:
    """The training loop."""
    noise, recent = scheduler(), None
    with Progress() as progress:
        bar = progress.add_task("denoiser", total=steps, completed=run.step)
        while run.step < steps:
            torch.manual_seed(run.step)
            latents, captions = data.batch(batch)
            states = run.text(tokenize(tokens, captions)).last_hidden_state
            loss = velocity_loss(run.unet, noise, latents, states)
            run.update(loss, steps)
            recent = loss.item() if recent is None else 0.99 * recent + 0.01 * loss.item()
            progress.update(bar, advance=1, description=f"denoiser, loss {recent:.4f}")
            if run.step % EVERY == 0:
                run.save()
                progress.console.log(f"step {run.step}, loss {recent:.4f}")


def prepare(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Settings that make training about 1.7 times faster on a CPU and change no result: memory format, attention."""
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(AttnProcessor())  # torch's fused kernel is slow for 16 keys
    return unet.to(memory_format=torch.channels_last)


def main(
    work: Path = Path("pocket-work"), variant: bool = False, steps: int = 5000, batch: int = 64, seed: int = 0
) -> None:
    """Train WORK/unet and WORK/text_encoder_final; with --variant, WORK/variant/unet on from them."""
    torch.manual_seed(seed)
    unet = prepare(denoiser())
    if variant:
        tokens = CLIPTokenizer.from_pretrained(work / "tokenizer")
        text = CLIPTextModel.from_pretrained(work / "text_encoder_final").requires_grad_(False)
        unet.load_state_dict(load_file(work / "unet" / "diffusion_pytorch_model.safetensors"))
        run = Run(unet, text, train_text=False, lr=4e-4, file=work / "variant.pt")
        weights = {style: 2.0 if index % 2 else 0.7 for index, style in enumerate(CLASSES)}
        data = Data(work, seed + 1 + 1000 * run.step, weights)
    else:
        tokens, text = text_parts(work, seed)
        run = Run(unet, text, train_text=True, lr=1e-3, file=work / "denoiser.pt")
        data = Data(work, seed + 1000 * run.step)
    train(run, data, tokens, steps, batch)
    run.ema.copy_to(run.parameters)
    run.unet.save_pretrained(work / "variant" / "unet" if variant else work / "unet")
    if not variant:
        run.text.save_pretrained(work / "text_encoder_final")


if __name__ == "__main__":
    typer.run(main)
