"""The training loop: one concept's coefficients, or those of several at once, until the stop rule says enough."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sepme_diffusers.algebra.objective import MomentumStop, balance, concept_representation, correlation_loss, sparsity
from sepme_diffusers.doors.linears import linear_of, text_projections
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.noise import NoisyPictures, Reference

_SAVE_EVERY = 25
_BATCHES_TO_SCALE, _MOST_SCALED = 2, 4.0
_SHARED = "B"


@dataclass(frozen=True)
class Step:
    """What is reported after every step: concept, steps taken, correlation loss, momentum statistic."""

    concept: str
    step: int
    loss: float
    momentum: float


class Learner:
    """One concept's increment while it is learnt: C_m or B, on a basis that stays as it is.

    Args:
        name: The concept's.
        basis: A, scaled (the paper's β S), (r, d).
        weights: W_m (d_out, d) by module name.
        pictures: Noisy pictures of the concept.
        config: How.
        start: An increment to start from, its A within the span of the basis. Default: zero.
    """

    def __init__(
        self,
        name: str,
        basis: Tensor,
        weights: Mapping[str, Tensor],
        pictures: NoisyPictures,
        config: SepMEConfig,
        start: Increment | None = None,
    ) -> None:
        self.name, self.pictures, self.weights = name, pictures, weights
        self.device = next(iter(weights.values())).device
        self.basis = basis.float().to(self.device)
        self.stop = MomentumStop(config.momentum, config.tolerance, config.min_steps, config.relative)
        self.steps_per_batch = config.steps_per_batch
        self._reference: Reference
        self.stopped = False
        self.warm = start is not None
        self.factors = {key: factor.requires_grad_() for key, factor in self._first(config, start).items()}

    def _first(self, config: SepMEConfig, start: Increment | None) -> dict[str, Tensor]:
        r, d = self.basis.shape
        heights = {_SHARED: d} if config.parametrisation == "text" else {m: len(w) for m, w in self.weights.items()}
        if start is None:
            return {key: torch.zeros(height, r, device=self.device) for key, height in heights.items()}
        # Coordinates of its A in the basis: A = L S.
        coordinates = start.A.double().to(self.device) @ torch.linalg.pinv(self.basis.double())
        factors = {_SHARED: start.B} if config.parametrisation == "text" else start.coefficients(self.weights)
        return {key: (factor.double().to(self.device) @ coordinates).float() for key, factor in factors.items()}

    def reference(self, unet: nn.Module) -> Reference:
        """What the next step learns from: a new noisy batch whenever one has served its steps."""
        if self.stop.step % self.steps_per_batch == 0:
            self._reference = Reference.of(unet, self.pictures.next())
        return self._reference

    def delta_weights(self) -> Iterator[Tensor]:
        """ΔW_m for each module, with gradient to the factors."""
        for module, weight in self.weights.items():
            text_side = self.factors.get(_SHARED)
            yield (self.factors[module] if text_side is None else weight.float() @ text_side) @ self.basis

    def increment(self) -> Increment:
        """The increment as it is now, on the CPU."""
        factors = {key: factor.detach().cpu() for key, factor in self.factors.items()}
        if _SHARED in factors:
            return Increment(self.basis.cpu(), B=factors[_SHARED])
        return Increment(self.basis.cpu(), C=factors)

    def metrics(self) -> dict[str, Any]:
        """Steps taken, the momentum statistic, and whether the rule stopped it."""
        return {"steps": self.stop.step, "momentum": self.stop.value, "stopped_by_rule": self.stopped}


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
    optimizer = torch.optim.Adam([f for one in learners for f in one.factors.values()], lr=config.learning_rate)
    first = 0 if state is None else state.restore(learners, optimizer)
    for one in learners if first == 0 else ():
        if one.warm:
            scale_warm_start(pipe.unet, one)
    # Only between batches: going on then draws the next one.
    save_every = config.steps_per_batch * max(1, _SAVE_EVERY // config.steps_per_batch)
    with pipe.progress_bar(total=config.max_steps) as bar:
        bar.update(first)
        for step in range(first, config.max_steps):
            active = [one for one in learners if not one.stopped]
            if not active:
                break
            _take_step(pipe.unet, active, learners, optimizer, config, on_step)
            bar.update()
            bar.set_description(", ".join(one.name for one in active))
            bar.set_postfix(momentum=f"{max(one.stop.value for one in active):+.1e}")
            if state is not None and (step + 1) % save_every == 0:
                state.save(step + 1, learners, optimizer)


@torch.no_grad()
def scale_warm_start(unet: nn.Module, learner: Learner) -> None:
    """Scale an increment to start from so that its correlation is about zero, by one secant: L is nearly linear in it.

    The momentum statistic starts at the first loss and forgets it slowly, so a start that is a little too weak or too
    strong costs dozens of steps.
    """
    batches = (learner.pictures.next() for _ in range(_BATCHES_TO_SCALE))
    found = [correlation(unet, Reference.of(unet, batch), [learner]) for batch in batches]
    edited, original = (sum(map(float, values)) for values in zip(*found, strict=True))
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
    factors = [factor for one in active for factor in one.factors.values()]
    losses, scales, gradients = [], [], []
    for one in active:
        loss, scale = correlation(unet, one.reference(unet), learners)
        refuse_divergence(loss, one.name, one.stop.step + 1)
        gradients.append(torch.autograd.grad(loss, factors, allow_unused=True))
        losses.append(loss.item())
        scales.append(scale)
    floors = [one.stop.threshold(scale) for one, scale in zip(active, scales, strict=True)]
    shares = balance(losses, floors)
    penalty = sum(sparsity(one.delta_weights()) for one in active)
    optimizer.zero_grad()
    (config.sparsity * penalty).backward(inputs=factors)
    for share, some in zip(shares, gradients, strict=True):
        for factor, gradient in zip(factors, some, strict=True):
            if gradient is not None:
                factor.grad += share * gradient
    optimizer.step()
    for one, loss, scale in zip(active, losses, scales, strict=True):
        one.stopped = one.stop.update(loss, scale)
        if on_step is not None:
            on_step(Step(one.name, one.stop.step, loss, one.stop.value))


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
        if _SHARED in learners[0].factors:
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
        return (inputs[0] + _change(inputs[0], learners, _SHARED), *inputs[1:])

    return hook


def _add_change(learners: Sequence[Learner], name: str) -> Callable[..., Any]:
    return lambda module, inputs, output: output + _change(inputs[0], learners, name)


def _change(embedding: Tensor, learners: Sequence[Learner], key: str) -> Tensor:
    e = embedding.float()
    return sum((e @ one.basis.T) @ one.factors[key].T for one in learners).to(embedding.dtype)


class TrainingState:
    """A file to go on from after an interruption, with the same result as without.

    Args:
        path: The file; written wholly or not at all.
        fingerprint: Of everything that the result depends on.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    def save(self, step: int, learners: Sequence[Learner], optimizer: torch.optim.Optimizer) -> None:
        """Write down where training is."""
        moments = optimizer.state_dict()["state"]
        tensors = {f"adam.{i}.{key}": torch.as_tensor(value) for i, of in moments.items() for key, value in of.items()}
        for i, one in enumerate(learners):
            tensors |= {f"{i}.factor.{key}": factor.detach() for key, factor in one.factors.items()}
            tensors |= {f"{i}.pictures.{key}": value for key, value in one.pictures.state().items()}
        stops = [(one.stopped, one.stop.step, one.stop.value, one.stop.scale) for one in learners]
        self._write(tensors, {"step": step, "stops": stops})

    def finish(self, increments: Sequence[Increment], metrics: Sequence[Mapping[str, Any]]) -> None:
        """Write down what came out."""
        tensors = {f"{i}.{key}": t for i, one in enumerate(increments) for key, t in one.tensors().items()}
        self._write(tensors, {"finished": [dict(some) for some in metrics]})

    def finished(self) -> list[tuple[Increment, dict[str, Any]]] | None:
        """Increments and metrics that an earlier run finished with, or None."""
        tensors, found = self._read()
        if "finished" not in found:
            return None
        made = []
        for i, metrics in enumerate(found["finished"]):
            own = {key.partition(".")[2]: t for key, t in tensors.items() if key.partition(".")[0] == str(i)}
            a, b = own.pop("A"), own.pop(_SHARED, None)
            made.append((Increment(a, B=b, C=own or None), metrics))
        return made

    def restore(self, learners: Sequence[Learner], optimizer: torch.optim.Optimizer) -> int:
        """Bring learners and optimizer where they were; returns the steps taken."""
        tensors, found = self._read()
        if "step" not in found:
            return 0
        for i, (one, stop) in enumerate(zip(learners, found["stops"], strict=True)):
            with torch.no_grad():
                for key, factor in one.factors.items():
                    factor.copy_(tensors[f"{i}.factor.{key}"])
            prefix = f"{i}.pictures."
            one.pictures.restore({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
            one.stopped, one.stop.step, one.stop.value, one.stop.scale = stop
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("adam."):
                _, i, name = key.split(".")
                moments.setdefault(int(i), {})[name] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        return found["step"]

    def _write(self, tensors: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"fingerprint": self.fingerprint, "found": json.dumps(found)}
        staged = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        staged.write_bytes(save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, metadata))
        os.replace(staged, self.path)

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not self.path.exists():
            return {}, {}
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            if metadata.get("fingerprint") == self.fingerprint:
                return tensors, json.loads(metadata["found"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} is no training state: {error}; remove it to start anew") from error
        raise ValueError(
            f"{self.path} is the training state of other concepts, settings, guards or another base; give another "
            "folder, or remove it to start anew"
        )
