"""Train the judge on the real pictures (augmented), and measure it on objects it never saw.

python examples/pocket/train_judge.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from rasterise import CLASSES
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from sepme_diffusers.pocket.judge import Judge
from sepme_diffusers.pocket.vocabulary import OBJECTS


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale, soften, tint and roughen images (n, 3, h, w) in [0, 1], each in its own way."""
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = uniform(0.92, 1.1)
    theta[:, :, 2] = uniform(-0.08, 0.08, 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blend = uniform(0, 1, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.5)
    images = soft * blend + images * (1 - blend)
    images = images * uniform(0.9, 1.1, 3, 1, 1) + uniform(-0.05, 0.05, 3, 1, 1)
    return (images + torch.randn(images.shape, generator=generator) * uniform(0, 0.06, 1, 1, 1)).clamp(0, 1)


def fit(pictures: Tensor, objects: Tensor, steps: int, seed: int, batch: int = 96) -> Judge:
    """A judge trained on pictures (styles, objects, views, h, w, 3), of the listed objects only."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    judge = Judge(len(CLASSES), len(OBJECTS)).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.15)
    for _ in track(range(steps), description="judge"):
        style = torch.randint(len(CLASSES), (batch,), generator=generator)
        object_ = objects[torch.randint(len(objects), (batch,), generator=generator)]
        view = torch.randint(pictures.shape[2], (batch,), generator=generator)
        images = pictures[style, object_, view].permute(0, 3, 1, 2).float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            style_logits, object_logits = judge(augment(images, generator))
        loss = F.cross_entropy(style_logits.float(), style, label_smoothing=0.05)
        loss = loss + F.cross_entropy(object_logits.float(), object_, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def accuracy(judge: Judge, pictures: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy of style and of object, each a tensor over the style classes."""
    right = []
    for style in range(len(CLASSES)):
        images = pictures[style, objects].flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        truth = objects.repeat_interleave(pictures.shape[2])
        style_logits, object_logits = judge(images)
        right.append(
            [(style_logits.argmax(1) == style).float().mean(), (object_logits.argmax(1) == truth).float().mean()]
        )
    return tuple(torch.tensor(right).T)


def main(work: Path = Path("pocket-work"), steps: int = 1500, seed: int = 0) -> None:
    """Measure on unseen objects (a fifth left out), then train on all and write WORK/judge.safetensors."""
    pictures = load_file(work / "pictures.safetensors")["pictures"]
    everything = torch.arange(len(OBJECTS))
    unseen = everything[::5]
    probe = fit(pictures, everything[everything % 5 != 0], steps // 3, seed)
    style, _ = accuracy(probe, pictures, unseen)
    report = {"style accuracy on unseen objects": dict(zip(CLASSES, style.tolist(), strict=True))}
    report["mean"] = style.mean().item()
    judge = fit(pictures, everything, steps, seed)
    style, object_ = accuracy(judge, pictures, everything)
    report["trained on all"] = {"style": style.tolist(), "object": object_.tolist()}
    (work / "judge.json").write_text(json.dumps(report, indent=2))
    typer.echo(json.dumps(report, indent=2))
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in judge.state_dict().items()
    }
    save_file(weights, work / "judge.safetensors")


if __name__ == "__main__":
    typer.run(main)
