"""SepMETrainer: makes increments of concepts and adds them to a bank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sepme_diffusers.algebra.closed_form import output_factor, reduced_rank_edit, with_gain
from sepme_diffusers.algebra.subspace import damped
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import refuse_other_text, refuse_other_weights
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.config import SepMEConfig, Solver
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.leakage import leakage, measured_leakage, output_norms
from sepme_diffusers.making.distribute import shared_out
from sepme_diffusers.making.guards import Capacity, Guards
from sepme_diffusers.making.learner import Learner
from sepme_diffusers.making.loop import Step, learn
from sepme_diffusers.making.noise import NoisyPictures, refuse_other_schedules, refuse_other_sizes
from sepme_diffusers.making.permanent import unlearn_permanently
from sepme_diffusers.making.soft_guards import SoftGuards, as_soft_guards
from sepme_diffusers.making.state import TrainingState
from sepme_diffusers.runtime.erasures import erasures_of
from sepme_diffusers.text.concept import BLANK, Concept, as_concepts
from sepme_diffusers.text.encoding import Encoded, rows
from sepme_diffusers.text.spelling import slug


class SepMETrainer:
    """Makes increments on a pipeline's UNet, which it leaves as it was.

    Args:
        pipe: A Stable Diffusion pipeline; its text encoder and UNet are only read.
        config: How.
        guards: Prompts that no increment may change, exactly, beside the names of the other concepts of the bank.
        soft_guards: Regular prompts that an increment should change little: prompts, or `SoftGuards`, of which those
            that name the concept are passed over; or the mean outer product of their tokens, (d, d), as it is.
        others: Names guarded like the bank's concepts although they are not in it.
        on_step: Called after every training step.
        state: A folder in which training is written down every few steps, a file a concept. A trainer with the same
            settings goes on from there, with the same result. Remove the folder once the bank is saved.

    Raises:
        ValueError: If the pipeline has erasures active: an increment is made on the original model.

    Started by `accelerate launch`, the concepts are shared out over the processes, and each gets the whole bank.

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
        soft_guards: SoftGuards | Tensor | Sequence[str] = (),
        others: Sequence[str] = (),
        on_step: Callable[[Step], None] | None = None,
        state: str | Path | None = None,
    ) -> None:
        erasures = erasures_of(pipe.unet)
        if erasures is not None and erasures.snapshot.standing:
            names = [erasures.snapshot.names.shown[key] for key in erasures.snapshot.standing]
            raise ValueError(f"the pipeline has erased {names}; restore them before making increments")
        self.pipe, self.config, self.on_step = pipe, config or SepMEConfig(), on_step
        self.guards = tuple(dict.fromkeys((BLANK, *guards)))
        self.others = tuple(others)
        self.state = None if state is None else Path(state)
        self._soft = as_soft_guards(pipe, soft_guards)
        self._weights = projection_weights(pipe.unet)
        self._encoded = Encoded(pipe)
        self._known_norms: dict[str, Tensor] = {}

    def erase(
        self,
        concepts: Iterable[Concept | str],
        bank: ConceptBank | None = None,
        pictures: Mapping[str, Sequence[Image.Image]] | None = None,
    ) -> ConceptBank:
        """The bank with an increment for each concept; its other increments are not touched.

        An increment leaves the guard prompts exactly as they were, and the names of all other concepts, of the bank
        and of this call, as well; where these do not fit (see `capacity`) they are damped, and what leaks is in the
        entry's metrics.

        Args:
            concepts: Concepts, or names for the paper's choice of prompt (the name against the blank prompt).
            bank: The bank to add to; made on the same base.
            pictures: {concept name: pictures x_0 to train on}, picture i showing pair i in turns. Default: the
                original model draws them.

        Raises:
            ValueError: If the concepts are not usable, the bank is of another base, or the guards leave no room.
            FloatingPointError: If training diverges.
        """
        found, guards, bank = self._prepared(concepts, bank)
        pictures = self._checked(pictures or {}, found)
        plans = [self._plan(concept, guards) for concept in found]
        joint = self.config.coupling == "joint" and self.config.solver != "closed_form"
        jobs = [plans] if joint else [[plan] for plan in plans]
        made = shared_out(jobs, lambda job: self._entries(job, guards, pictures))
        return bank.with_entries(entry for entries in made for entry in entries)

    def capacity(self, concepts: Iterable[Concept | str], bank: ConceptBank | None = None) -> dict[str, Capacity]:
        """What there is room for, by concept, before anything is made.

        Args:
            concepts: What would be erased.
            bank: The bank that it would join.

        Raises:
            ValueError: As `erase`.
        """
        found, guards, _ = self._prepared(concepts, bank)
        return {concept.name: self._capacity(concept, guards) for concept in found}

    def erase_permanently(
        self, concepts: Iterable[Concept | str], pictures: Mapping[str, Sequence[Image.Image]] | None = None
    ) -> dict[str, Tensor]:
        """The changed cross-attention weights {parameter name: weight} of a UNet that has unlearnt the concepts.

        The paper's unconstrained variant (‡), for what must never come back: every weight of the cross-attentions is
        free, nothing is guarded, nothing can be restored. The pipeline is left as it was;
        `pipe.unet.load_state_dict(changed, strict=False)` makes it so. Use `SepMEConfig.unconstrained()`.

        Raises:
            ValueError: If the concepts are not usable.
            FloatingPointError: If training diverges.

        Source: arXiv 2402.05947 (unconstrained variant).
        """
        found = as_concepts(concepts)
        pictures = self._checked(pictures or {}, found)
        noisy = [self._pictures(concept, pictures) for concept in found]
        return unlearn_permanently(self.pipe, [c.name for c in found], noisy, self.config, self.on_step)

    def base(self) -> BaseModel:
        """What increments of this trainer are made on."""
        name = str(self.pipe.config.get("_name_or_path") or type(self.pipe).__name__)
        if Path(name).is_dir():  # whoever gets the bank has no use for a path of this machine
            name = Path(name).name
        shapes = {name: (w.shape[0], float(w.float().norm())) for name, w in self._weights.items()}
        width = next(iter(self._weights.values())).shape[1]
        return BaseModel(name, width, self.pipe.tokenizer.model_max_length, shapes)

    def _prepared(
        self, concepts: Iterable[Concept | str], bank: ConceptBank | None
    ) -> tuple[list[Concept], Guards, ConceptBank]:
        found = as_concepts(concepts)
        if bank is None:
            bank = ConceptBank(self.base())
        else:
            refuse_other_weights(bank, self._weights)
            refuse_other_text(self.pipe, [bank])
        names = tuple(dict.fromkeys((*bank, *self.others, *(concept.name for concept in found))))
        # Together and in one order, so that every process that shares the work gets the same numbers.
        texts = [p for concept in found for group in (concept.prompts, *concept.anchors) for p in group]
        self._encoded([*self.guards, *names, *texts, *(without for c in found for _, without in c.pairs)])
        return found, Guards(self._encoded, self.guards, names, self.config), bank

    def _checked(
        self, pictures: Mapping[str, Sequence[Image.Image]], found: Sequence[Concept]
    ) -> Mapping[str, Sequence[Image.Image]]:
        names = [concept.name for concept in found]
        if unknown := sorted(set(pictures) - set(names)):
            raise ValueError(f"pictures of {unknown}, which are not being erased; being erased: {names}")
        for concept in found:
            refuse_other_sizes(self.pipe, concept, pictures.get(concept.name, ()))
        if self.config.solver != "closed_form":
            refuse_other_schedules(self.pipe.scheduler)
        return pictures

    def _pictures(self, concept: Concept, pictures: Mapping[str, Sequence[Image.Image]]) -> NoisyPictures:
        return NoisyPictures(self.pipe, concept, self.config, self._encoded, pictures.get(concept.name, ()))

    def _plan(self, concept: Concept, guards: Guards, solver: Solver | None = None) -> _Plan:
        """Everything that is known of an increment before training: checks, null space, closed form."""
        reach, null = guards.refuse_unreachable(concept), guards.null(concept)
        embeddings, closed, full = self._encoded(concept.prompts), None, None
        solver = solver or self.config.solver
        if solver != "train" or self.config.basis == "aligned":
            own, change = rows(embeddings), rows(self._encoded.anchors(concept) - embeddings)
            closed = reduced_rank_edit(
                own,
                change,
                null,
                self.config.rank,
                self._soft_penalty(concept),
                self.config.ridge,
                self._output_factor,
                guards.penalty_inside(concept),
            )
            if self.config.gain is not None:
                closed = with_gain(closed, own, change, self.config.gain, self._output_factor)
        if solver != "closed_form" and self.config.basis == "full":
            damping = guards.penalty(concept)
            full = null if damping is None else damped(null, damping, rows(embeddings))
        return _Plan(concept, guards.prompts(concept), reach, len(null), closed, full)

    def _soft_penalty(self, concept: Concept) -> Tensor | None:
        if self._soft is None:
            return None
        soft = self._soft if isinstance(self._soft, Tensor) else self._soft.without(self.pipe, concept)
        return self.config.soft_guard_weight * soft.to(self._encoded.device)

    @cached_property
    def _output_factor(self) -> Tensor:
        return output_factor(self._weights.values()).to(self._encoded.device)

    def _capacity(self, concept: Concept, guards: Guards) -> Capacity:
        plan = self._plan(concept, guards, "closed_form")
        names = [name for name in guards.names if name != concept.name]
        increment = self._gated(plan.closed_increment(), concept)
        leaks = (
            leakage(increment, self._encoded(names), self._weights, self._norms(names)) if names else torch.zeros(1)
        )
        return Capacity(
            concept.name, guards.width, plan.dimensions_left, guards.dimensions_taken(concept), guards.exact,
            plan.reach, float(leaks.max()),
        )  # fmt: skip

    def _entries(
        self, plans: Sequence[_Plan], guards: Guards, pictures: Mapping[str, Sequence[Image.Image]]
    ) -> list[Entry]:
        """The entries of concepts that are made together: one, or all of a joint training."""
        if self.config.solver == "closed_form":
            made = [(plan.closed_increment(), {}) for plan in plans]
        else:
            made = self._learnt(plans, pictures)
        entries = []
        for plan, (ungated, trained) in zip(plans, made, strict=True):
            increment, tokens = self._gated(ungated, plan.concept), self._encoded(plan.guards)
            norms = self._norms(plan.guards)
            leaks = measured_leakage(increment, plan.guards, tokens, self._weights, guards.damped, norms)
            metrics = {"dimensions_left": plan.dimensions_left, "reach": plan.reach, **trained, **leaks}
            entries.append(Entry(plan.concept, increment, self.config, plan.guards, metrics))
        return entries

    def _gated(self, increment: Increment, concept: Concept) -> Increment:
        share = self.config.gate
        return increment if share is None else increment.gated(self._encoded(concept.prompts), share)

    def _norms(self, prompts: Sequence[str]) -> Tensor:
        """`output_norms` of prompts, each computed once."""
        if new := [prompt for prompt in prompts if prompt not in self._known_norms]:
            self._known_norms.update(zip(new, output_norms(self._encoded(new), self._weights), strict=True))
        return torch.stack([self._known_norms[prompt] for prompt in prompts])

    def _learnt(
        self, plans: Sequence[_Plan], pictures: Mapping[str, Sequence[Image.Image]]
    ) -> list[tuple[Increment, dict[str, Any]]]:
        """Increments that were trained together, and what training says of them."""
        state = self._state_of(plans, pictures)
        if state is not None and (finished := state.finished()) is not None:
            return finished
        learners = []
        for plan in plans:
            start = plan.closed_increment() if self.config.solver == "closed_form+train" else None
            noisy = self._pictures(plan.concept, pictures)
            learners.append(Learner(plan.concept.name, self._basis(plan), self._weights, noisy, self.config, start))
        learn(self.pipe, learners, self.config, self.on_step, state)
        made = [(one.increment(), one.metrics()) for one in learners]
        if state is not None:
            state.finish(*zip(*made, strict=True))
        return made

    def _basis(self, plan: _Plan) -> Tensor:
        """β S: the whole null space, or the orthonormal directions that the closed form found, scaled."""
        directions = plan.full
        if directions is None:
            directions = torch.linalg.svd(plan.closed[0], full_matrices=False).Vh
        beta = self.config.beta
        if self.config.relative:
            # An Adam step moves every coefficient by about lr, so a wider basis takes a longer step.
            beta *= (768 / len(directions)) ** 0.5
            if self.config.parametrisation == "text":
                # ... and what moves the embedding moves a projection by as much as its rows are long.
                squares = [weight.float().square().sum(dim=1) for weight in self._weights.values()]
                beta /= float(torch.cat(squares).mean().sqrt())
        return beta * directions

    def _state_of(self, plans: Sequence[_Plan], pictures: Mapping[str, Sequence[Image.Image]]) -> TrainingState | None:
        """Where the training of these concepts is written down."""
        if self.state is None:
            return None
        soft = self._soft if self._soft is None or isinstance(self._soft, Tensor) else self._soft.covariance
        images = [image.tobytes() for plan in plans for image in pictures.get(plan.concept.name, ())]
        depends_on = {
            "base": vars(self.base()),
            "config": self.config.to_dict(),
            "concepts": [plan.concept.to_dict() for plan in plans],
            "guards": [plan.guards for plan in plans],
            "soft guards": None if soft is None else _digest(soft.cpu().contiguous().numpy().tobytes()),
            "pictures": _digest(*images),
        }
        names = [plan.concept.name for plan in plans]
        file = f"{slug(names[0])}-{_digest(*(name.encode() for name in names))[:8]}.safetensors"
        return TrainingState(self.state / file, _digest(json.dumps(depends_on, sort_keys=True).encode()))


@dataclass(frozen=True)
class _Plan:
    """An increment before training: its concept and guards, ‖E P‖ / ‖E‖, and what there is to start from.

    `closed` holds A and B of the closed form, `full` the directions of a full basis.
    """

    concept: Concept
    guards: tuple[str, ...]
    reach: float
    dimensions_left: int
    closed: tuple[Tensor, Tensor] | None
    full: Tensor | None

    def closed_increment(self) -> Increment:
        a, b = self.closed
        return Increment(a.float().cpu(), B=b.float().cpu())


def _digest(*parts: bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()
