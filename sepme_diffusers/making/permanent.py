"""The paper's unconstrained variant: cross-attention weights that have unlearnt concepts, for good."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.func import functional_call

from sepme_diffusers.algebra.objective import MomentumStop, concept_representation, correlation_loss
from sepme_diffusers.doors.linears import cross_attentions, plain
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.gradients import frozen, gradients
from sepme_diffusers.making.loop import Step, refuse_divergence
from sepme_diffusers.making.noise import NoisyPictures, Reference


def unlearn_permanently(
    pipe: Any,
    names: Sequence[str],
    pictures: Sequence[NoisyPictures],
    config: SepMEConfig,
    on_step: Callable[[Step], None] | None = None,
) -> dict[str, Tensor]:
    """Return changed weights of every cross-attention, {parameter name: weight}; concepts one after the other.

    Four passes a step, two of them with gradient: without guards the prediction without the concept moves as well.

    Args:
        pipe: The original model, which is left as it was.
        names: The concepts' names.
        pictures: Noisy pictures, one sequence per concept.
        config: `learning_rate`, `momentum`, `tolerance`, steps.
        on_step: Called after every step.

    Raises:
        FloatingPointError: If a loss is not finite.

    Source: arXiv 2402.05947 (unconstrained variant).
    """
    attentions = cross_attentions(pipe.unet)
    weights = {
        f"{name}.{key}": parameter.detach().clone().float().requires_grad_()
        for name, attention in attentions.items()
        for key, parameter in attention.named_parameters()
    }
    for name, noisy in zip(names, pictures, strict=True):
        _unlearn(pipe, name, noisy, weights, config, on_step)
    return {name: weight.detach().to(pipe.unet.dtype) for name, weight in weights.items()}


def _unlearn(
    pipe: Any,
    name: str,
    pictures: NoisyPictures,
    weights: dict[str, Tensor],
    config: SepMEConfig,
    on_step: Callable[[Step], None] | None,
) -> None:
    optimizer = torch.optim.Adam(weights.values(), lr=config.learning_rate)
    stop = MomentumStop(config.momentum, config.tolerance, config.min_steps, config.relative)
    step = _Step(plain(pipe.unet))
    with pipe.progress_bar(total=config.max_steps) as bar:
        bar.set_description(name)
        for _ in range(config.max_steps):
            if stop.step % config.steps_per_batch == 0:
                reference = Reference.of(pipe.unet, pictures.next())
            loss, slopes = step.with_weights(weights, reference, name, stop.step + 1)
            for weight, slope in zip(weights.values(), slopes, strict=True):
                weight.grad = slope
            optimizer.step()
            stopping = stop.update(loss.item(), reference.correlation)
            bar.update()
            bar.set_postfix(momentum=f"{stop.value:+.1e}")
            if on_step is not None:
                on_step(Step(name, stop.step, loss.item(), stop.value))
            if stopping:
                break


class _Step(nn.Module):
    """The loss of a denoiser and its gradients, as a module: all of it runs with other weights in place.

    Gradient checkpointing runs the denoiser again for the gradients, and must find the same weights there.
    """

    def __init__(self, unet: ModelMixin) -> None:
        super().__init__()
        self.unet = unet

    def with_weights(
        self, weights: Mapping[str, Tensor], reference: Reference, name: str, number: int
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Compute the loss and its gradients with respect to these weights, which replace the denoiser's own.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        with frozen(self.unet):
            cast = {f"unet.{key}": weight.to(self.unet.dtype) for key, weight in weights.items()}
            return functional_call(self, cast, (list(weights.values()), reference, name, number))

    def forward(
        self, weights: Sequence[Tensor], reference: Reference, name: str, number: int
    ) -> tuple[Tensor, list[Tensor | None]]:
        batch = reference.batch
        predicted = batch.predict_noise(self.unet, batch.with_concept.then(batch.without))
        loss = correlation_loss(concept_representation(*predicted.chunk(2)), reference.representation)
        refuse_divergence(loss, name, number)
        return loss.detach(), gradients(loss, weights, self.unet.dtype, reference.slope)
