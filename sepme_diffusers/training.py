"""SepMETrainer: makes increments, one concept at a time, and adds them to a bank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sepme_diffusers.bank import BaseModel, ConceptBank, Entry
from sepme_diffusers.closed_form import covariance, output_factor, reduced_rank_edit
from sepme_diffusers.concepts import BLANK, Concept, as_concepts, encode, rows
from sepme_diffusers.config import SepMEConfig
from sepme_diffusers.hooks import erasures_of
from sepme_diffusers.increment import Increment
from sepme_diffusers.objective import MomentumStop, concept_representation, correlation_loss, sparsity
from sepme_diffusers.subspace import null_space, project
from sepme_diffusers.targets import projection_weights

# Below this share of its embedding, what the guards leave of a concept is rounding.
_LEAST_REACH = 1e-4


@dataclass(frozen=True)
class Step:
    """What the trainer reports after every step: concept, steps taken, correlation loss, momentum statistic."""

    concept: str
    step: int
    loss: float
    momentum: float


class SepMETrainer:
    """Makes increments on a pipeline's UNet, which it leaves as it was.

    Args:
        pipe: A Stable Diffusion pipeline; its text encoder and UNet are only read.
        config: How.
        guards: Prompts that no increment may change, exactly, beside the other concepts of the bank.
        soft_guards: Regular prompts that an increment should change little, or the mean outer product of their
            tokens, (d, d), see `closed_form.covariance`.
        others: Names guarded like the bank's concepts although they are not in it.
        on_step: Called after every training step.

    Raises:
        ValueError: If the pipeline has erasures active: an increment is made on the original model.

    Example:
        >>> from sepme_diffusers import Concept, SepMEConfig, SepMEPipeline, SepMETrainer, pocket
        >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
        >>> neon = Concept.from_template("neon", "a cat in the style of {concept}", without="a cat")
        >>> bank = SepMETrainer(pipe, SepMEConfig(solver="closed_form")).erase([neon])
        >>> list(bank)
        ['neon']
    """

    def __init__(
        self,
        pipe: Any,
        config: SepMEConfig | None = None,
        guards: Sequence[str] = (BLANK,),
        soft_guards: Sequence[str] | Tensor = (),
        others: Sequence[str] = (),
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        erasures = erasures_of(pipe.unet)
        if erasures is not None and erasures.active:
            names = [erasures.names.shown[key] for key in erasures.active]
            raise ValueError(f"the pipeline has erased {names}; restore them before making increments")
        self.pipe, self.config, self.on_step = pipe, config or SepMEConfig(), on_step
        self.guards = tuple(dict.fromkeys((BLANK, *guards)))
        self.soft_guards, self.others = soft_guards, tuple(others)
        self._weights = projection_weights(pipe.unet)

    def erase(self, concepts: Iterable[Concept | str], bank: ConceptBank | None = None) -> ConceptBank:
        """A bank with an increment for each concept; the increments that the given bank holds are untouched.

        Each increment leaves the guard prompts and the names of all other concepts, of the bank and of this call,
        exactly as they were.

        Args:
            concepts: Concepts, or names for the paper's choice of prompt (the name against the blank prompt).
            bank: The bank to add to; made on the same base.

        Raises:
            ValueError: If the concepts are not usable, the bank is of another base, or the guards leave no room.
        """
        found = as_concepts(concepts)
        bank = bank if bank is not None else ConceptBank(self.base())
        if bank.base.width != self.base().width:
            raise ValueError(f"the bank is for embeddings of width {bank.base.width}, not {self.base().width}")
        names = dict.fromkeys((*bank, *self.others, *(concept.name for concept in found)))
        soft = self._soft_covariance()
        return bank.with_entries([self._entry(concept, names, soft) for concept in found])

    def _soft_covariance(self) -> Tensor | None:
        if isinstance(self.soft_guards, Tensor):
            return self.soft_guards
        return covariance(rows(encode(self.pipe, self.soft_guards))) if self.soft_guards else None

    def base(self) -> BaseModel:
        """What increments of this trainer are made on."""
        name = str(self.pipe.config.get("_name_or_path") or type(self.pipe).__name__)
        if Path(name).is_dir():  # whoever gets the bank has no use for a path of this machine
            name = Path(name).name
        shapes = {name: (w.shape[0], float(w.float().norm())) for name, w in self._weights.items()}
        width = next(iter(self._weights.values())).shape[1]
        return BaseModel(name, width, self.pipe.tokenizer.model_max_length, shapes)

    def _entry(self, concept: Concept, names: Iterable[str], soft: Tensor | None) -> Entry:
        started = time.perf_counter()
        guards = (*self.guards, *(name for name in names if name != concept.name))
        null = null_space(rows(encode(self.pipe, guards)), self.config.guard_tolerance)
        metrics: dict[str, Any] = {"dimensions_left": len(null), "reach": self._reach(concept, guards, null)}
        if self.config.solver == "closed_form":
            increment = self._closed_form(concept, null, soft)
        else:
            increment, trained = self._train(concept, null, soft)
            metrics |= trained
        metrics |= increment.measured_leakage(guards, encode(self.pipe, guards), self._weights)
        metrics["seconds"] = round(time.perf_counter() - started, 3)
        return Entry(concept, increment, self.config, guards, metrics)

    def _reach(self, concept: Concept, guards: tuple[str, ...], null: Tensor) -> float:
        """‖E P‖ / ‖E‖: how much of the concept's embedding an increment can touch at all."""
        embeddings = rows(encode(self.pipe, concept.prompts)).double()
        reach = float((embeddings @ null.T).norm() / embeddings.norm())
        if reach < _LEAST_REACH:
            raise ValueError(
                f"the {len(guards)} guard prompts fill the space that {concept.name!r} lives in (reach {reach:.1e}): "
                "nothing can be erased; guard fewer prompts, or move some of them to the soft guards"
            )
        return reach

    def _closed_form(self, concept: Concept, null: Tensor, soft: Tensor | None) -> Increment:
        embeddings = encode(self.pipe, concept.prompts)
        unique = list(dict.fromkeys(prompt for prompts in concept.anchors for prompt in prompts))
        encoded = dict(zip(unique, encode(self.pipe, unique), strict=True))
        anchors = torch.stack([sum(encoded[prompt] for prompt in ps) / len(ps) for ps in concept.anchors])
        a, b = reduced_rank_edit(
            rows(embeddings),
            rows(anchors - embeddings),
            null,
            self.config.rank,
            None if soft is None else self.config.soft_guard_weight * soft,
            self.config.ridge,
            output_factor(self._weights.values()),
        )
        return Increment(a.float().cpu(), B=b.float().cpu())

    def _basis(self, concept: Concept, null: Tensor, soft: Tensor | None) -> Tensor:
        """β S: the whole null space, or the orthonormal directions that the closed form found, scaled."""
        if self.config.basis == "aligned":
            directions = self._closed_form(concept, null, soft).A.double().to(null.device)
            null = torch.linalg.svd(project(directions, null), full_matrices=False).Vh
        beta = self.config.beta
        if self.config.relative:
            # An Adam step moves every coefficient by about lr, so a wider basis takes a longer step.
            beta *= (768 / len(null)) ** 0.5
        return (beta * null).float()

    def _train(self, concept: Concept, null: Tensor, soft: Tensor | None) -> tuple[Increment, dict[str, Any]]:
        config, device = self.config, next(iter(self._weights.values())).device
        a = self._basis(concept, null, soft).to(device)
        c = {name: torch.zeros(len(w), len(a), device=device, requires_grad=True) for name, w in self._weights.items()}
        optimizer = torch.optim.Adam(c.values(), lr=config.learning_rate)
        stop = MomentumStop(config.momentum, config.tolerance, config.min_steps, config.relative)
        batches = _NoisyBatches(self.pipe, concept, config)
        for _ in range(config.max_steps):
            loss = self._correlation(batches.next(), a, c)
            total = loss + config.sparsity * sparsity(w @ a for w in c.values())
            optimizer.zero_grad()
            total.backward(inputs=list(c.values()))
            optimizer.step()
            stopping = stop.update(loss.item())
            if self.on_step is not None:
                self.on_step(Step(concept.name, stop.step, loss.item(), stop.value))
            if stopping:
                break
        increment = Increment(a.cpu(), C={name: w.detach().cpu() for name, w in c.items()})
        return increment, {"steps": stop.step, "momentum": stop.value, "stopped_by_rule": stopping}

    def _correlation(self, batch: _Batch, a: Tensor, c: dict[str, Tensor]) -> Tensor:
        """L_cor with three passes a step: both frozen ones in one batch without gradient, one edited with.

        The edited model's prediction without the concept is taken from the frozen one: exact for a guarded prompt,
        and for any other the reference that the edit must not drift from.
        """
        with torch.no_grad():
            frozen_with, frozen_without = batch.predict_noise(self.pipe.unet, both=True).chunk(2)
        with _increments_attached(self.pipe.unet, a, c):
            edited = batch.predict_noise(self.pipe.unet, both=False)
        frozen = concept_representation(frozen_with, frozen_without)
        return correlation_loss(concept_representation(edited, frozen_without), frozen)


@dataclass(frozen=True)
class _Batch:
    """Noisy latents x_t at timesteps t, with the embeddings of their prompts with and without the concept."""

    noisy: Tensor
    steps: Tensor
    with_concept: Tensor
    without: Tensor
    alphas: Tensor
    prediction_type: str

    def predict_noise(self, unet: nn.Module, both: bool) -> Tensor:
        """ε(x_t, c), or ε for both prompts one after the other, (n or 2n, channels, h, w), float32."""
        copies = 2 if both else 1
        noisy, steps = self.noisy.repeat(copies, 1, 1, 1), self.steps.repeat(copies)
        states = torch.cat([self.with_concept, self.without]) if both else self.with_concept
        output = unet(noisy.to(unet.dtype), steps, states.to(unet.dtype)).sample.float()
        if self.prediction_type == "epsilon":
            return output
        alpha = self.alphas.repeat(copies)[:, None, None, None]
        return alpha.sqrt() * output + (1 - alpha).sqrt() * noisy


class _NoisyBatches:
    """Endless noisy versions x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε of pictures x_0 that the original model makes."""

    def __init__(self, pipe: Any, concept: Concept, config: SepMEConfig) -> None:
        kind = pipe.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"the scheduler predicts {kind!r}; training knows 'epsilon' and 'v_prediction'")
        self.pipe, self.concept, self.config, self.kind = pipe, concept, config, kind
        self.generator = torch.Generator().manual_seed(config.seed)
        self.with_concept = encode(pipe, concept.prompts)
        self.without = encode(pipe, [without for _, without in concept.pairs])
        self.pair = torch.arange(config.n_images) % len(concept.pairs)
        self.latents = self._original_pictures()

    def _original_pictures(self) -> Tensor:
        """x_0 as latents, (n_images, channels, h, w), float32."""
        prompts = [self.concept.prompts[pair] for pair in self.pair]
        parts = []
        for start in range(0, len(prompts), self.config.batch_size):
            made = self.pipe(
                prompts[start : start + self.config.batch_size],
                num_inference_steps=self.config.image_steps,
                guidance_scale=self.config.guidance_scale,
                generator=self.generator,
                output_type="latent",
            )
            parts.append(made.images.float())
        return torch.cat(parts)

    def next(self) -> _Batch:
        """The next batch; the same sequence for the same seed."""
        n, scheduler, device = self.config.batch_size, self.pipe.scheduler, self.latents.device
        chosen = torch.randint(len(self.latents), (n,), generator=self.generator)
        steps = torch.randint(scheduler.config.num_train_timesteps, (n,), generator=self.generator)
        latents = self.latents[chosen.to(device)]
        noise = torch.randn(latents.shape, generator=self.generator).to(device)
        alphas = scheduler.alphas_cumprod[steps].to(device)
        scale = alphas[:, None, None, None]
        noisy = scale.sqrt() * latents + (1 - scale).sqrt() * noise
        pair = self.pair[chosen].to(device)
        return _Batch(noisy, steps.to(device), self.with_concept[pair], self.without[pair], alphas, self.kind)


class _increments_attached:
    """Adds (e Aᵀ) C_mᵀ to the text projections, with gradient to C, while the block runs."""

    def __init__(self, unet: nn.Module, a: Tensor, c: dict[str, Tensor]) -> None:
        self.modules = {name: unet.get_submodule(name) for name in c}
        self.a, self.c = a, c

    def __enter__(self) -> None:
        self.handles = [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]

    def _hook(self, name: str) -> Callable[..., Tensor]:
        return lambda module, inputs, output: (
            output + ((inputs[0].float() @ self.a.T) @ self.c[name].T).to(output.dtype)
        )

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
