"""Noisy pictures of a concept, and what a denoiser predicts on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from sepme_diffusers.algebra.objective import concept_representation, correlation_loss
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import Encoded

_TEXTS = ("with_concept", "without")
_KNOWN = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Text:
    """What a denoiser reads beside the picture, one row per prompt.

    Args:
        states: e(c), (n, n_tokens, d).
        added: Further conditions by name, rows (n, ...): SDXL's pooled embedding and sizes.
    """

    states: Tensor
    added: dict[str, Tensor]

    def __getitem__(self, rows: Tensor) -> Text:
        return Text(self.states[rows], {name: value[rows] for name, value in self.added.items()})

    def then(self, other: Text) -> Text:
        """Return these rows with those of another below."""
        added = {name: torch.cat([value, other.added[name]]) for name, value in self.added.items()}
        return Text(torch.cat([self.states, other.states]), added)


@dataclass(frozen=True)
class Batch:
    """Noisy latents x_t (n, channels, h, w) at timesteps t, with their prompts with and without the concept."""

    noisy: Tensor
    steps: Tensor
    with_concept: Text
    without: Text
    alphas: Tensor
    prediction_type: str

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """Put batches of one model below each other."""
        parts = [[getattr(batch, name) for batch in batches] for name in ("noisy", "steps", "alphas")]
        noisy, steps, alphas = (torch.cat(tensors) for tensors in parts)
        with_concept, without = (reduce(Text.then, [getattr(b, name) for b in batches]) for name in _TEXTS)
        return cls(noisy, steps, with_concept, without, alphas, batches[0].prediction_type)

    def predict_noise(self, unet: ModelMixin, text: Text) -> Tensor:
        """Predict ε(x_t, c) for one prompt per picture or several in turn, (len(text), channels, h, w), float32."""
        copies = len(text.states) // len(self.noisy)
        noisy, steps = self.noisy.repeat(copies, 1, 1, 1), self.steps.repeat(copies)
        added = {name: value.to(unet.dtype) for name, value in text.added.items()}
        states = text.states.to(unet.dtype)
        output = unet(noisy.to(unet.dtype), steps, states, added_cond_kwargs=added or None).sample.float()
        if self.prediction_type == "epsilon":
            return output
        alpha = self.alphas.repeat(copies)[:, None, None, None]
        if self.prediction_type == "sample":
            return (noisy - alpha.sqrt() * output) / (1 - alpha).sqrt()
        return alpha.sqrt() * output + (1 - alpha).sqrt() * noisy


@dataclass(frozen=True)
class Reference:
    """A noisy batch, and what the original model predicts on it: ε(x_t, without the concept), and its r_c."""

    batch: Batch
    without: Tensor
    representation: Tensor

    @property
    def correlation(self) -> float:
        """L_cor of the original model with itself: the mean square of its r_c."""
        return correlation_loss(self.representation, self.representation).item()

    @property
    def slope(self) -> float:
        """The largest derivative of L_cor with respect to a number of the predicted noise, max |r_c| / their count."""
        return self.representation.abs().max().item() / self.representation.numel()

    @classmethod
    def of(cls, unet: ModelMixin, batch: Batch) -> Reference:
        """Predict on the batch, with and without the concept in one pass."""
        return cls.of_each(unet, [batch])[0]

    @classmethod
    @torch.no_grad()
    def of_each(cls, unet: ModelMixin, batches: Sequence[Batch]) -> list[Reference]:
        """Predict on batches, all in one pass."""
        joined, counts = Batch.joined(batches), [len(batch.noisy) for batch in batches]
        both = joined.predict_noise(unet, joined.with_concept.then(joined.without)).chunk(2)
        parts = zip(batches, *(predicted.split(counts) for predicted in both), strict=True)
        return [
            cls(batch, without, concept_representation(with_concept, without))
            for batch, with_concept, without in parts
        ]


class NoisyPictures:
    """Endless noisy versions x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε of pictures x_0 of a concept.

    Args:
        pipe: The original model.
        concept: Shown by the pictures.
        config: How many pictures, and the seed.
        encoded: Embeddings of the concept's prompts.
        pictures: x_0; picture i shows pair i, in turns. Default: the original model draws them.

    Raises:
        ValueError: If the scheduler has no noise schedule that training knows, or pictures are of the wrong size.
    """

    def __init__(
        self,
        pipe: Any,
        concept: Concept,
        config: SepMEConfig,
        encoded: Encoded,
        pictures: Sequence[Image.Image] = (),
    ) -> None:
        refuse_other_schedules(pipe.scheduler)
        self.pipe, self.concept, self.config = pipe, concept, config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.with_concept = _text(pipe, concept.prompts, encoded)
        self.without = _text(pipe, [without for _, without in concept.pairs], encoded)
        self.latents = _latents(pipe, concept, pictures) if pictures else self._drawn()
        self.pair = torch.arange(len(self.latents)) % len(concept.pairs)

    def _drawn(self) -> Tensor:
        """x_0 as latents that the original model draws, (n_images, channels, h, w), float32."""
        prompts = [self.concept.prompts[i % len(self.concept.pairs)] for i in range(self.config.n_images)]
        parts = []
        for start in range(0, len(prompts), self.config.batch_size):
            drawn = self.pipe(
                prompts[start : start + self.config.batch_size],
                num_inference_steps=self.config.image_steps,
                guidance_scale=self.config.guidance_scale,
                generator=self.generator,
                output_type="latent",
            )
            parts.append(drawn.images.float())
        return torch.cat(parts)

    def next(self) -> Batch:
        """Return the next batch; the same sequence for the same seed."""
        n, scheduler, device = self.config.batch_size, self.pipe.scheduler, self.latents.device
        chosen = torch.randint(len(self.latents), (n,), generator=self.generator)
        steps = torch.randint(scheduler.config.num_train_timesteps, (n,), generator=self.generator)
        latents = self.latents[chosen.to(device)]
        noise = torch.randn(latents.shape, generator=self.generator).to(device)
        alphas = scheduler.alphas_cumprod[steps].to(device)
        scale = alphas[:, None, None, None]
        noisy = scale.sqrt() * latents + (1 - scale).sqrt() * noise
        pair = self.pair[chosen].to(device)
        kind = scheduler.config.prediction_type
        return Batch(noisy, steps.to(device), self.with_concept[pair], self.without[pair], alphas, kind)

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` goes on from."""
        return {"latents": self.latents, "generator": self.generator.get_state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self.latents = state["latents"].to(self.latents.device)
        self.generator.set_state(state["generator"].cpu())


def refuse_other_schedules(scheduler: Any) -> None:
    """Check that a scheduler adds noise in a way that training knows.

    Raises:
        ValueError: If it has no ᾱ_t (flow matching, EDM), or predicts something else than noise, velocity or picture.
    """
    kind = scheduler.config.get("prediction_type")
    if getattr(scheduler, "alphas_cumprod", None) is None or kind not in _KNOWN:
        raise ValueError(
            f"{type(scheduler).__name__} (prediction_type {kind!r}) has no schedule that training knows: it needs "
            f"alphas_cumprod and one of {_KNOWN}; flow matching has neither. solver='closed_form' needs no noise"
        )


def _text(pipe: Any, prompts: Sequence[str], encoded: Encoded) -> Text:
    return Text(encoded(prompts), _added(pipe, prompts))


@torch.no_grad()
def _added(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """SDXL's conditions beside the prompt's tokens, as at inference; nothing for other pipelines."""
    if pipe.unet.config.get("addition_embed_type") != "text_time":
        return {}
    device = pipe._execution_device
    pooled = pipe.encode_prompt(
        list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )[2]
    size = _size(pipe)
    ids = pipe._get_add_time_ids(size, (0, 0), size, pooled.dtype, pipe.text_encoder_2.config.projection_dim)
    return {"text_embeds": pooled, "time_ids": ids.to(device).repeat(len(prompts), 1)}


def _size(pipe: Any) -> tuple[int, int]:
    """Height and width in pixels that the pipeline draws by default."""
    sample = pipe.unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def refuse_other_sizes(pipe: Any, concept: Concept, pictures: Sequence[Image.Image]) -> None:
    """Check the size of pictures that are to be x_0.

    Raises:
        ValueError: If one is not of the size that the pipeline draws.
    """
    height, width = _size(pipe)
    if wrong := {i: picture.size for i, picture in enumerate(pictures) if picture.size != (width, height)}:
        raise ValueError(
            f"pictures of {concept.name!r} must be {width} x {height} pixels, as the model draws; "
            f"these (by index: width, height) are not: {wrong}"
        )


@torch.no_grad()
def _latents(pipe: Any, concept: Concept, pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures as latents, (n, channels, h, w), float32."""
    refuse_other_sizes(pipe, concept, pictures)
    vae = pipe.vae
    parts = []
    for picture in pictures:
        pixels = pipe.image_processor.preprocess(picture.convert("RGB")).to(pipe._execution_device, vae.dtype)
        parts.append(vae.encode(pixels).latent_dist.mode().float())
    shift = vae.config.get("shift_factor") or 0.0
    return (torch.cat(parts) - shift) * vae.config.scaling_factor
