"""The training loop, and one step of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from sepme_diffusers.algebra.objective import balance, concept_representation, correlations
from sepme_diffusers.doors.attachment import Attachment
from sepme_diffusers.doors.attachment import attached as attach_edit
from sepme_diffusers.doors.family import TOKENS
from sepme_diffusers.doors.linears import plain
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.gradients import frozen, gradients
from sepme_diffusers.making.learner import SHARED, Learner
from sepme_diffusers.making.noise import Batch, Reference
from sepme_diffusers.making.state import TrainingState

_SAVE_EVERY = 25
# Rows of a pass that learners share: what a batch of the default size has.
_ROWS_TOGETHER = 8
# By how many noisy pictures an increment is scaled, and at most by how much.
_PICTURES_TO_SCALE, _MOST_SCALED = 32, 4.0


@dataclass(frozen=True)
class Step:
    """What is reported after every step: concept, steps taken, correlation loss, momentum statistic."""

    concept: str
    step: int
    loss: float
    momentum: float


def learn(
    pipe: Any,
    learners: Sequence[Learner],
    config: SepMEConfig,
    on_step: Callable[[Step], None] | None = None,
    state: TrainingState | None = None,
) -> None:
    """Train until every learner has stopped, or for `max_steps`.

    Minimises Σ_i η_i L_cor,i + λ Σ_i ‖ΔW_i‖₁ / M, each L_cor,i of the model with the increments of all learners on it.
    A learner that has stopped stays as it is: going on would only destroy what is unrelated. In the end each of these
    is scaled to where its loss is zero, if `rescale` is on.

    Args:
        pipe: The original model, which is left as it was.
        learners: One, or several that are trained together (the paper's joint variant).
        config: The settings.
        on_step: Called after every step, for each learner.
        state: Where to go on from, and what is written every few steps.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    factors = [factor for learner in learners for factor in learner.factors.values()]
    optimizer = torch.optim.Adam(factors, lr=config.learning_rate)
    first = 0 if state is None else state.restore(learners, optimizer)
    if first == 0:
        for learner in learners:
            if learner.warm:
                rescale(pipe.unet, learner, config.batch_size)
    # Only between batches: going on then draws the next one.
    save_every = config.steps_per_batch * max(1, _SAVE_EVERY // config.steps_per_batch)
    with pipe.progress_bar(total=config.max_steps) as bar:
        bar.update(first)
        for step in range(first, config.max_steps):
            active = [learner for learner in learners if not learner.stopped]
            if not active:
                break
            take_step(pipe.unet, active, learners, optimizer, config, on_step)
            bar.update()
            bar.set_description(", ".join(learner.name for learner in active))
            bar.set_postfix(momentum=f"{max(learner.stop.value for learner in active):+.1e}")
            if state is not None and (step + 1) % save_every == 0:
                state.save(step + 1, learners, optimizer)
    for learner in learners:
        if learner.stopped and config.rescale:
            rescale(pipe.unet, learner, config.batch_size)


@torch.no_grad()
def rescale(unet: ModelMixin, learner: Learner, batch_size: int) -> None:
    """Scale an increment so that its correlation on fresh noise is about zero, by a secant: L is nearly linear in it.

    Before training it makes a start of the closed form: the momentum statistic begins at the first loss and forgets it
    slowly, so a start that is a little too weak or too strong costs dozens of steps. After training it takes back what
    went too far: the statistic follows the loss with a delay, so the loss is below zero by then.
    """
    count = math.ceil(_PICTURES_TO_SCALE / batch_size)
    references = [Reference.of(unet, learner.pictures.next()) for _ in range(count)]
    with attached(unet, [learner]):
        edited = sum(float(correlation(unet, reference)) for reference in references)
    original = sum(reference.correlation for reference in references)
    if edited < original:  # else no scale makes it better
        for factor in learner.factors.values():
            factor.mul_(min(original / (original - edited), _MOST_SCALED))


def take_step(
    unet: ModelMixin,
    active: Sequence[Learner],
    learners: Sequence[Learner],
    optimizer: torch.optim.Optimizer,
    config: SepMEConfig,
    on_step: Callable[[Step], None] | None = None,
) -> None:
    """Take one step of the active learners, with the increments of all learners on the model.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    factors = [factor for learner in active for factor in learner.factors.values()]
    _take_references(unet, [learner for learner in active if learner.stop.between_batches], config.batch_size)
    passes = []
    for some in _together(active, config.batch_size):
        # Until the gradient is taken: with gradient checkpointing that runs the denoiser again, edited like before.
        with frozen(unet), attached(unet, learners):
            passes.append(_Pass.of(unet, some, factors))
    largest = max(each.largest for each in passes)
    sparsity = [slope for learner in active for slope in learner.sparsity_gradient().values()]
    for factor, slope in zip(factors, sparsity, strict=True):
        factor.grad = config.sparsity * slope
    for each in passes:
        _add_gradients(factors, largest / each.largest if each.largest else 1.0, each.slopes)
    optimizer.step()
    optimizer.zero_grad()
    for learner, value in zip(active, [loss for each in passes for loss in each.losses], strict=True):
        learner.stopped = learner.stop.update(value, learner.reference.correlation)
        if on_step is not None:
            on_step(Step(learner.name, learner.stop.step, value, learner.stop.value))


@dataclass(frozen=True)
class _Pass:
    """What one pass found, for as many learners as it served.

    Args:
        losses: L_i.
        largest: max_i ‖L_i‖.
        slopes: The gradient of Σ_i η_i L_i for each factor, with η_i = largest / ‖L_i‖.
    """

    losses: Sequence[float]
    largest: float
    slopes: Sequence[Tensor | None]

    @classmethod
    def of(cls, unet: ModelMixin, learners: Sequence[Learner], factors: Sequence[Tensor]) -> _Pass:
        references = [learner.reference for learner in learners]
        products = correlation_maps(unet, references)
        losses, sizes = [product.mean() for product in products], [float(p.detach().norm()) for p in products]
        for learner, loss in zip(learners, losses, strict=True):
            refuse_divergence(loss, learner.name, learner.stop.step + 1)
        shares = balance(sizes)
        total = torch.stack([share * loss for share, loss in zip(shares, losses, strict=True)]).sum()
        steepest = max(share * reference.slope for share, reference in zip(shares, references, strict=True))
        slopes = gradients(total, factors, unet.dtype, steepest)
        return cls([loss.item() for loss in losses], max(sizes), slopes)


def _take_references(unet: ModelMixin, learners: Sequence[Learner], batch_size: int) -> None:
    """Give each learner a new noisy batch, with what the original model predicts on it."""
    for some in _together(learners, batch_size):
        found = Reference.of_each(unet, [learner.pictures.next() for learner in some])
        for learner, reference in zip(some, found, strict=True):
            learner.reference = reference


def _together(learners: Sequence[Learner], batch_size: int) -> list[Sequence[Learner]]:
    """Divide learners in parts that share a pass: of small batches several, of large ones each alone."""
    count = max(1, _ROWS_TOGETHER // batch_size)
    return [learners[start : start + count] for start in range(0, len(learners), count)]


def _add_gradients(factors: Sequence[Tensor], share: float, slopes: Sequence[Tensor | None]) -> None:
    for factor, slope in zip(factors, slopes, strict=True):
        if factor.grad is not None and slope is not None:
            factor.grad += share * slope


def refuse_divergence(loss: Tensor, name: str, step: int) -> None:
    """Check that a loss is a number.

    Raises:
        FloatingPointError: If not.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss of {name!r} is {loss.item()} at step {step}, and nothing was kept. Lower learning_rate or "
            "beta, or use a model in float32"
        )


def correlation(unet: ModelMixin, reference: Reference) -> Tensor:
    """Compute L_cor of the model as it is now, with the increments that are attached to it; a scalar."""
    return correlation_maps(unet, [reference])[0].mean()


def correlation_maps(unet: ModelMixin, references: Sequence[Reference]) -> list[Tensor]:
    """Compute r_c(θ+Δθ) ⊙ r_c(θ) of the model as it is now, (n, channels, h, w) for each reference, in one pass.

    This is one pass beside those of the reference. The edited model's prediction without the concept is taken from the
    original: exact for a guarded prompt, and for any other the reference that the edit must not drift from.
    """
    batch = Batch.joined([reference.batch for reference in references])
    edited = batch.predict_noise(unet, batch.with_concept).split([len(each.batch.noisy) for each in references])
    return [
        correlations(concept_representation(predicted, each.without), each.representation)
        for predicted, each in zip(edited, references, strict=True)
    ]


def attached(unet: ModelMixin, learners: Sequence[Learner]) -> AbstractContextManager[Attachment]:
    """While the block runs, the learners' increments act on the denoiser, with gradient to their factors.

    Take gradients inside the block: gradient checkpointing runs the Linears again for them.
    """
    return attach_edit(plain(unet), LearnersEdit(learners))


@dataclass(frozen=True, eq=False)
class LearnersEdit:
    """The increments of learners as an edit of a denoiser: at its doors, or behind its text Linears.

    Args:
        learners: Those whose increments act; all text-side or all per-module.
    """

    learners: Sequence[Learner]

    @property
    def at_linears(self) -> bool:
        """Whether the increments are per-module ones."""
        return SHARED not in self.learners[0].factors

    def edit(self, embeddings: Mapping[str, Tensor], pictures: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return the edited embeddings by door, and the unedited tokens for `change` to read."""
        tokens = embeddings[TOKENS]
        edited = {} if self.at_linears else {TOKENS: tokens + self._sum(tokens, SHARED)}
        for learner in self.learners:
            for door, increment in learner.doors.items():
                edited[door] = _edited(edited.get(door, embeddings[door]), embeddings[door], increment)
        return edited, tokens

    def change(self, name: str, reading: Tensor) -> Tensor:
        """Return what the increments add to the output of a Linear that reads the tokens."""
        return self._sum(reading, name)

    def _sum(self, embedding: Tensor, key: str) -> Tensor:
        # Σ_i e A_iᵀ C_iᵀ is one product with the factors side by side.
        factors = torch.cat([learner.factors[key] for learner in self.learners], dim=1)
        return ((embedding.float() @ self._bases.T) @ factors.T).to(embedding.dtype)

    @cached_property
    def _bases(self) -> Tensor:
        return torch.cat([learner.basis for learner in self.learners])


def _edited(edited: Tensor, embedding: Tensor, increment: Increment) -> Tensor:
    """Add to an edited embedding (n, d) what a text-side increment makes of the unedited one, whatever its gate."""
    if increment.B is None:
        raise ValueError("what an increment does at a further door must be text-side")
    a, b = (factor.to(embedding.device).float() for factor in (increment.A, increment.B))
    return edited + ((embedding.float() @ a.T) @ b.T).to(embedding.dtype)
