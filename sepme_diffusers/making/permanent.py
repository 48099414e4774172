"""The paper's unconstrained variant: cross-attention weights that have unlearnt concepts, for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sepme_diffusers.algebra.objective import MomentumStop, concept_representation, correlation_loss
from sepme_diffusers.doors.linears import cross_attentions
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.loop import Step, refuse_divergence
from sepme_diffusers.making.noise import Batch, NoisyPictures, Reference


def unlearn_permanently(
    pipe: Any,
    names: Sequence[str],
    pictures: Sequence[NoisyPictures],
    config: SepMEConfig,
    on_step: Callable[[Step], None] | None = None,
) -> dict[str, Tensor]:
    """Changed weights of every cross-attention, {parameter name: weight}; concepts one after the other.

    Four passes a step, two of them with gradient: without guards the prediction without the concept moves as well.

    Args:
        pipe: The original model, which is left as it was.
        names: Of the concepts.
        pictures: Noisy pictures of each concept.
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
    edited_unet = _Edited(pipe.unet, weights)
    with pipe.progress_bar(total=config.max_steps) as bar:
        bar.set_description(name)
        for _ in range(config.max_steps):
            if stop.step % config.steps_per_batch == 0:
                reference = Reference.of(pipe.unet, pictures.next())
            loss = correlation_loss(_representation(edited_unet, reference.batch), reference.representation)
            refuse_divergence(loss, name, stop.step + 1)
            optimizer.zero_grad()
            loss.backward(inputs=list(weights.values()))
            optimizer.step()
            stopping = stop.update(loss.item(), reference.correlation)
            bar.update()
            bar.set_postfix(momentum=f"{stop.value:+.1e}")
            if on_step is not None:
                on_step(Step(name, stop.step, loss.item(), stop.value))
            if stopping:
                break


def _representation(unet: Any, batch: Batch) -> Tensor:
    both = batch.with_concept.then(batch.without)
    return concept_representation(*batch.predict_noise(unet, both).chunk(2))


class _Edited:
    """A denoiser computed with other weights, which leaves its own as they were."""

    def __init__(self, unet: nn.Module, weights: dict[str, Tensor]) -> None:
        self.unet, self.weights, self.dtype = unet, weights, unet.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cast = {name: weight.to(self.dtype) for name, weight in self.weights.items()}
        return functional_call(self.unet, cast, args, kwargs)
