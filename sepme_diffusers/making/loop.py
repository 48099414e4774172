"""The training loop: one concept's coefficients, or those of several at once, until the stop rule says enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sepme_diffusers.algebra.objective import balance, concept_representation, correlation_loss, sparsity
from sepme_diffusers.doors.linears import linear_of, text_projections
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.learner import SHARED, Learner
from sepme_diffusers.making.noise import Reference
from sepme_diffusers.making.state import TrainingState

_SAVE_EVERY = 25
_BATCHES_TO_SCALE, _MOST_SCALED = 2, 4.0


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
    """Train until every learner has stopped, or `max_steps`.

    Minimises Σ_i η_i L_cor,i + λ Σ_i ‖ΔW_i‖₁ / M, each L_cor,i of the model with the increments of all learners on it.
    One that has stopped stays as it is: going on would only destroy what is unrelated.

    Args:
        pipe: The original model, which is left as it was.
        learners: One, or several that are trained together (the paper's joint variant).
        config: How.
        on_step: Called after every step, for each learner.
        state: Where to go on from, and what is written every few steps.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    optimizer = torch.optim.Adam(
        [f for learner in learners for f in learner.factors.values()], lr=config.learning_rate
    )
    first = 0 if state is None else state.restore(learners, optimizer)
    for learner in learners if first == 0 else ():
        if learner.warm:
            scale_warm_start(pipe.unet, learner)
    # Only between batches: going on then draws the next learner.
    save_every = config.steps_per_batch * max(1, _SAVE_EVERY // config.steps_per_batch)
    with pipe.progress_bar(total=config.max_steps) as bar:
        bar.update(first)
        for step in range(first, config.max_steps):
            active = [learner for learner in learners if not learner.stopped]
            if not active:
                break
            _take_step(pipe.unet, active, learners, optimizer, config, on_step)
            bar.update()
            bar.set_description(", ".join(learner.name for learner in active))
            bar.set_postfix(momentum=f"{max(learner.stop.value for learner in active):+.1e}")
            if state is not None and (step + 1) % save_every == 0:
                state.save(step + 1, learners, optimizer)


@torch.no_grad()
def scale_warm_start(unet: nn.Module, learner: Learner) -> None:
    """Scale an increment to start from so that its correlation is about zero, by one secant: L is nearly linear in it.

    The momentum statistic starts at the first loss and forgets it slowly, so a start that is a little too weak or too
    strong costs dozens of steps.
    """
    batches = (learner.pictures.next() for _ in range(_BATCHES_TO_SCALE))
    pairs = [correlation(unet, Reference.of(unet, batch), [learner]) for batch in batches]
    edited, original = (sum(map(float, values)) for values in zip(*pairs, strict=True))
    if edited < original:  # else it is no start at all, and training has to turn it round
        for factor in learner.factors.values():
            factor.mul_(min(original / (original - edited), _MOST_SCALED))


def _take_step(
    unet: nn.Module,
    active: Sequence[Learner],
    learners: Sequence[Learner],
    optimizer: torch.optim.Optimizer,
    config: SepMEConfig,
    on_step: Callable[[Step], None] | None,
) -> None:
    factors = [factor for learner in active for factor in learner.factors.values()]
    losses, scales, gradients = [], [], []
    for learner in active:
        loss, scale = correlation(unet, learner.reference(unet), learners)
        refuse_divergence(loss, learner.name, learner.stop.step + 1)
        gradients.append(torch.autograd.grad(loss, factors, allow_unused=True))
        losses.append(loss.item())
        scales.append(scale)
    floors = [learner.stop.threshold(scale) for learner, scale in zip(active, scales, strict=True)]
    shares = balance(losses, floors)
    penalty = sum(sparsity(learner.delta_weights()) for learner in active)
    optimizer.zero_grad()
    (config.sparsity * penalty).backward(inputs=factors)
    for share, some in zip(shares, gradients, strict=True):
        for factor, gradient in zip(factors, some, strict=True):
            if gradient is not None:
                factor.grad += share * gradient
    optimizer.step()
    for learner, loss, scale in zip(active, losses, scales, strict=True):
        learner.stopped = learner.stop.update(loss, scale)
        if on_step is not None:
            on_step(Step(learner.name, learner.stop.step, loss, learner.stop.value))


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


def correlation(unet: nn.Module, reference: Reference, learners: Sequence[Learner]) -> tuple[Tensor, float]:
    """L_cor of the model with increments, with gradient, and that of the original.

    One pass beside those of the reference. The edited model's prediction without the concept is taken from the
    original: exact for a guarded prompt, and for any other the reference that the edit must not drift from.
    """
    with attached(unet, learners):
        edited = reference.batch.predict_noise(unet, reference.batch.with_concept)
    representation = concept_representation(edited, reference.without)
    return correlation_loss(representation, reference.representation), reference.correlation


@contextmanager
def attached(unet: nn.Module, learners: Sequence[Learner]) -> Iterator[None]:
    """While the block runs, the learners' increments act on the text projections, with gradient to their factors."""
    projections = {name: linear_of(module) for name, module in text_projections(unet).items()}
    handles = []
    for name, linear in projections.items():
        if SHARED in learners[0].factors:
            handles.append(linear.register_forward_pre_hook(_edit_input(learners)))
        else:
            handles.append(linear.register_forward_hook(_add_change(learners, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _edit_input(learners: Sequence[Learner]) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] + _change(inputs[0], learners, SHARED), *inputs[1:])

    return hook


def _add_change(learners: Sequence[Learner], name: str) -> Callable[..., Any]:
    return lambda module, inputs, output: output + _change(inputs[0], learners, name)


def _change(embedding: Tensor, learners: Sequence[Learner], key: str) -> Tensor:
    e = embedding.float()
    return sum((e @ learner.basis.T) @ learner.factors[key].T for learner in learners).to(embedding.dtype)
