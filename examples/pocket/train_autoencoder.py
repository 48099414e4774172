"""Train the autoencoder on the real pictures and encode them all into WORK/latents.safetensors.

    python examples/pocket/train_autoencoder.py

Eager and in the default memory format on purpose: other settings collapsed.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

LATENT_NOISE = 0.05


def autoencoder() -> AutoencoderKL:
    """An untrained autoencoder: 64 x 64 x 3 to 16 x 16 x 4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def slopes(images: Tensor) -> Tensor:
    """Differences between neighbouring pixels, which keep contours sharp."""
    return torch.cat([images.diff(dim=2).flatten(1), images.diff(dim=3).flatten(1)], dim=1)


def reconstruction_loss(model: AutoencoderKL, images: Tensor, sharp: bool) -> Tensor:
    """Mean squared error, later with absolute errors of pixels and slopes, plus a whisper of KL."""
    posterior = model.encode(images).latent_dist
    latents = posterior.mode()
    decoded = model.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
    loss = F.mse_loss(decoded, images) + 1e-6 * latents.pow(2).mean()
    if sharp:
        loss = loss + 0.1 * F.l1_loss(decoded, images) + 0.1 * F.l1_loss(slopes(decoded), slopes(images))
    return loss


@torch.no_grad()
def standardise(model: AutoencoderKL, latents: Tensor) -> None:
    """Fold per-channel standardisation of the latents into quant_conv and post_quant_conv, exactly."""
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    model.quant_conv.weight[:4] /= std[:, None, None, None]
    model.quant_conv.bias[:4] = (model.quant_conv.bias[:4] - mean) / std
    weight = model.post_quant_conv.weight.clone()
    model.post_quant_conv.bias += weight[:, :, 0, 0] @ mean
    model.post_quant_conv.weight *= std[None, :, None, None]


@torch.no_grad()
def encode(model: AutoencoderKL, pictures: Tensor, batch: int = 128) -> Tensor:
    """Latents (n, 4, 16, 16) of pictures (n, 64, 64, 3)."""
    return torch.cat([model.encode(to_images(part)).latent_dist.mode() for part in pictures.split(batch)])


def to_images(pictures: Tensor) -> Tensor:
    """Bytes (n, h, w, 3) as images (n, 3, h, w) in [-1, 1]."""
    return (pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def main(work: Path = Path("pocket-work"), steps: int = 1800, batch: int = 24, seed: int = 0) -> None:
    """Train, standardise the latents, save WORK/vae and WORK/latents.safetensors."""
    drawn = load_file(work / "pictures.safetensors")
    pictures = drawn["pictures"].flatten(0, 2)
    torch.manual_seed(seed)
    model = autoencoder().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    with Progress() as progress:
        bar = progress.add_task("autoencoder", total=steps)
        for step in range(steps):
            images = to_images(pictures[torch.randint(len(pictures), (batch,))])
            with torch.autocast("cpu", torch.bfloat16):
                loss = reconstruction_loss(model, images, sharp=step > steps // 4)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(bar, advance=1, description=f"autoencoder, loss {loss.item():.4f}")
            if step % 100 == 0:
                progress.console.log(f"step {step}, loss {loss.item():.4f}")
    model.eval()
    probe = pictures[torch.randperm(len(pictures))[:1024]]
    standardise(model, encode(model, probe))
    with torch.no_grad():
        error = F.mse_loss(model.decode(encode(model, probe)).sample, to_images(probe))
    typer.echo(f"PSNR {10 * torch.log10(4 / error).item():.2f} dB")
    model.save_pretrained(work / "vae")
    latents = {"latents": encode(model, pictures).unflatten(0, drawn["pictures"].shape[:3])}
    latents["watermark"] = encode(model, drawn["watermark"][None])[0]
    save_file(latents, work / "latents.safetensors")


if __name__ == "__main__":
    typer.run(main)
