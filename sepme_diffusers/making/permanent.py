"""The paper's unconstrained variant: cross-attention weights that have unlearnt concepts, for good."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.func import functional_call

from sepme_diffusers.doors.linears import cross_attentions, plain
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.gradients import frozen, gradients
from sepme_diffusers.making.learner import stop_rule
from sepme_diffusers.making.loop import Step, correlation, refuse_divergence
from sepme_diffusers.making.noise import NoisyPictures, Reference

Slopes = Sequence[Tensor | None]


def unlearn_permanently(
    pipe: Any,
    names: Sequence[str],
    pictures: Sequence[NoisyPictures],
    config: SepMEConfig,
    on_step: Callable[[Step], None] | None = None,
) -> dict[str, Tensor]:
    """Return changed weights of every cross-attention, {parameter name: weight}, that have unlearnt all concepts.

    Minimises Σ_i L_cor,i + λ ‖Δθ‖₁ / M over the M weights, the sum over the concepts whose statistic is above τ. Each
    step measures every concept, so one that rises again, because of what another one's step did, is in the sum again.
    The steps end when all statistics are at τ or below. The prediction without the concept is the original model's:
    if it moved as well, the prompt without the concept would be drawn towards the concept.

    Args:
        pipe: The original model, which is left as it was.
        names: The concepts' names.
        pictures: Noisy pictures, one sequence per concept.
        config: `learning_rate`, `momentum`, `tolerance`, `sparsity`, steps.
        on_step: Called after every step, for each concept.

    Raises:
        FloatingPointError: If a loss is not finite.

    Source: arXiv 2402.05947 (unconstrained variant).
    """
    original = {
        f"{name}.{key}": parameter.detach().clone().float()
        for name, attention in cross_attentions(pipe.unet).items()
        for key, parameter in attention.named_parameters()
    }
    weights = {name: weight.clone().requires_grad_() for name, weight in original.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=config.learning_rate)
    concepts = [_Unlearnt(name, noisy, config) for name, noisy in zip(names, pictures, strict=True)]
    loss = _Loss(plain(pipe.unet))
    with pipe.progress_bar(total=config.max_steps) as bar:
        for _ in range(config.max_steps):
            active = [concept for concept in concepts if concept.active]
            if not active:
                break
            bar.set_description(", ".join(concept.name for concept in active))
            for name, weight in weights.items():
                weight.grad = config.sparsity / len(weights) * (weight.detach() - original[name]).sign()
            measured = [concept.measure(loss, weights) for concept in concepts]
            optimizer.step()
            bar.update()
            bar.set_postfix(momentum=f"{max(concept.stop.value for concept in concepts):+.1e}")
            if on_step is not None:
                for concept, value in zip(concepts, measured, strict=True):
                    on_step(Step(concept.name, concept.stop.step, value, concept.stop.value))
    return {name: weight.detach().to(pipe.unet.dtype) for name, weight in weights.items()}


class _Unlearnt:
    """A concept while it is unlearnt.

    Args:
        name: Its name.
        pictures: Noisy pictures of it.
        config: `momentum`, `tolerance`, steps.
    """

    def __init__(self, name: str, pictures: NoisyPictures, config: SepMEConfig) -> None:
        self.name, self.pictures, self.stop = name, pictures, stop_rule(config)
        self.active = True
        self._reference: Reference

    def measure(self, loss: _Loss, weights: Mapping[str, Tensor]) -> float:
        """Compute the loss, and add its gradient to the weights' while the concept is in the sum.

        Raises:
            FloatingPointError: If it is not finite.
        """
        if self.stop.between_batches:
            self._reference = Reference.of(loss.unet, self.pictures.next())
        value, slopes = loss.of(weights, self._reference, self.active)
        refuse_divergence(value, self.name, self.stop.step + 1)
        for weight, slope in zip(weights.values(), slopes, strict=True) if self.active else ():
            if weight.grad is not None and slope is not None:
                weight.grad += slope
        self.active = not self.stop.update(value.item(), self._reference.correlation)
        return value.item()


class _Loss(nn.Module):
    """The loss of a denoiser and its gradients, as a module: all of it runs with other weights in place.

    Gradient checkpointing runs the denoiser again for the gradients, and must find the same weights there.
    """

    def __init__(self, unet: ModelMixin) -> None:
        super().__init__()
        self.unet = unet

    def of(self, weights: Mapping[str, Tensor], reference: Reference, with_gradients: bool) -> tuple[Tensor, Slopes]:
        """Compute the loss with these weights in place of the denoiser's own, and its gradients if they are wanted."""
        with frozen(self.unet), torch.set_grad_enabled(with_gradients):
            cast = {f"unet.{key}": weight.to(self.unet.dtype) for key, weight in weights.items()}
            return functional_call(self, cast, (list(weights.values()), reference))

    def forward(self, weights: Sequence[Tensor], reference: Reference) -> tuple[Tensor, Slopes]:
        loss = correlation(self.unet, reference)
        if not loss.requires_grad or not torch.isfinite(loss):
            return loss.detach(), []
        return loss.detach(), gradients(loss, weights, self.unet.dtype, reference.slope)
