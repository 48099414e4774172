"""SepMETrainer: makes increments of concepts and adds them to a bank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from sepme_diffusers.algebra.closed_form import output_factor
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import refuse_other_base, refuse_other_text, refuse_other_weights
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.bank.fingerprint import Fingerprint, heights_and_norms
from sepme_diffusers.doors.family import TOKENS
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.distribute import shared_out
from sepme_diffusers.making.embedded import EmbeddedConcept
from sepme_diffusers.making.guards import NAMES_AT_A_TIME, Capacity, Guards
from sepme_diffusers.making.kinds.wording import Worded, described
from sepme_diffusers.making.loop import Step
from sepme_diffusers.making.maker import entry_of, measured
from sepme_diffusers.making.measure import Embeddings, LeakageMeter
from sepme_diffusers.making.noise import NoisyPictures, refuse_other_schedules, refuse_other_sizes
from sepme_diffusers.making.permanent import unlearn_permanently
from sepme_diffusers.making.plan import Plan, Problem
from sepme_diffusers.making.regular import Regular, lexicon_of, regular_guards
from sepme_diffusers.making.soft_guards import SoftGuards, as_soft_guards
from sepme_diffusers.making.solvers import SOLVERS, Task
from sepme_diffusers.making.state import TrainingState
from sepme_diffusers.runtime.erasures import unedited
from sepme_diffusers.text.concept import BLANK, Concept, as_concepts
from sepme_diffusers.text.encoding import Encoded
from sepme_diffusers.text.spelling import bare

logger = logging.get_logger(__name__)

Pictures = Mapping[str, Sequence[Image.Image]]

# A bank of more concepts is not packaged as adapters by default, so its gated increments get none.
_MOST_ADAPTERS = 200


class SepMETrainer:
    """Make increments on a pipeline's UNet, which is left as it was.

    Args:
        pipe: A Stable Diffusion pipeline; its text encoder and UNet are only read. The closed form needs no UNet: a
            pipeline that was loaded with `unet=None` will do, and every change of an embedding counts alike then.
        config: The settings.
        guards: Prompts that no increment may change at all, beside the names of the bank's other concepts.
        regular: Regular prompts that an increment should change little, and by which it is calibrated; those that
            name the concept are passed over. Default: some thousands that the package or the model's folder brings,
            see `regular_guards`. A number: so many of these. Or prompts, or `SoftGuards`; none if the list is empty.
            Or the mean outer product of their tokens, (d, d), which is used as it is, calibrates nothing, and says
            nothing of further doors.
        others: Names that are guarded like the bank's concepts although they are not in it.
        on_step: Called after every training step.
        state: A folder in which training is written down every few steps, one file per concept. A trainer with the
            same settings goes on from there, with the same result. Remove the folder once the bank is saved.

    Raises:
        ValueError: If the solver trains and there is no UNet, or a gate is to be calibrated without regular prompts.

    Started by `accelerate launch`, the processes share the concepts out among them, and each gets the whole bank.

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
        regular: SoftGuards | Tensor | Sequence[str] | int | None = None,
        others: Sequence[str] = (),
        on_step: Callable[[Step], None] | None = None,
        state: str | Path | None = None,
    ) -> None:
        self.pipe, self.config, self.on_step = pipe, config or SepMEConfig(), on_step
        self.guards = tuple(dict.fromkeys((BLANK, *guards)))
        self.others = tuple(others)
        self.state = None if state is None else Path(state)
        self._solver = SOLVERS[self.config.solver]
        if pipe.unet is None and self._solver.trains:
            raise ValueError(
                f"solver={self._solver.name!r} trains on pictures that the denoiser draws, and this pipeline has none "
                "(unet=None); load it with its denoiser, or use SepMEConfig(solver='closed_form')"
            )
        self._weights = projection_weights(pipe.unet) if pipe.unet is not None else {}
        self._encoded = Encoded(pipe)
        self._regular = self._regular_of(regular)
        self._wordings: dict[str, Worded] = {}
        if self.config.is_calibrated and not self._regular.calibrates:
            raise ValueError(
                "to calibrate takes regular prompts, ten or more: leave regular= out, or give more; or give the "
                "weight and the gate as numbers: SepMEConfig(soft_guard_weight=100.0, gate=None)"
            )

    def _regular_of(self, regular: SoftGuards | Tensor | Sequence[str] | int | None) -> Regular:
        if regular is None and not self.config.is_calibrated:
            regular = ()
        if regular is None or isinstance(regular, int):
            return Regular(self.pipe, self._encoded, regular_guards(self.pipe, regular), lexicon_of(self.pipe))
        return Regular(self.pipe, self._encoded, as_soft_guards(self.pipe, regular))

    def erase(
        self,
        concepts: Iterable[Concept | str],
        bank: ConceptBank | None = None,
        pictures: Pictures | None = None,
        *,
        kind: str | None = None,
    ) -> ConceptBank:
        """Return the bank with an increment for each concept; its other increments are not touched.

        An increment leaves the guard prompts exactly as they were, and so the names of all other concepts, of the bank
        and of this call. Where not all names fit (see `capacity`) an increment with a gate keeps the first ones
        exactly: `others`, then the bank's concepts, then these, and what the bank always erases at last. The rest is
        damped, without a gate all of them are, and what leaks is in the entry's metrics.

        Args:
            concepts: Concepts, or names of one kind.
            bank: The bank to add to; made on the same base, or for text-side increments with the same text encoder.
            pictures: {concept name: pictures x_0 to train on}, picture i showing pair i in turns. Default: the
                original model draws them.
            kind: Of bare names: "style", "object", "person", "content", one that the model's folder brings, or the
                path of a JSON file like theirs.

        Raises:
            ValueError: If the concepts are not usable, the bank is of another base, or the guards leave no room.
            FloatingPointError: If training diverges.
        """
        concepts, problem, bank = self._prepared(concepts, bank, kind)
        if self._solver.trains and self.config.parametrisation == "module":
            refuse_other_base(bank, self.base())
            bank = replace(bank, base=bank.base.completed_by(self.base()))
        pictures = self._checked(pictures or {}, concepts)
        # Before anything is trained all are checked; what is merely solved for is prepared when it is its turn.
        plans = {concept: self._plan(concept, problem) for concept in concepts if self._solver.trains}
        joint = self.config.coupling == "joint" and self._solver.trains
        groups = [concepts] if joint else [[concept] for concept in concepts]

        def make(group: Sequence[Concept]) -> list[Entry]:
            prepared = [plans[concept] if concept in plans else self._plan(concept, problem) for concept in group]
            return self._entries(prepared, pictures)

        with unedited(self.pipe) if self.pipe.unet is not None else nullcontext():
            made = shared_out(groups, make)
        entries = (entry for group in made for entry in group)
        known = [outline.guards.set for outline in bank.entries.outlines().values()]
        guards = problem.guard_set(known)
        names = partial(self._batches, problem.guards.names)
        finished = measured(entries, problem, self._embeddings(self.guards), names, self._weights)
        for doubt in (doubt for entry in finished for doubt in entry.doubts):
            logger.warning(doubt)
        grown = bank.with_entries(replace(entry, guard_set=guards) for entry in finished)
        return grown if self.pipe.unet is None else grown.remembering(self.pipe)

    def capacity(
        self, concepts: Iterable[Concept | str], bank: ConceptBank | None = None, *, kind: str | None = None
    ) -> dict[str, Capacity]:
        """Tell what there is room for, by concept, before anything is made.

        Args:
            concepts: What would be erased.
            bank: The bank that it would join.
            kind: Of bare names, see `erase`.

        Raises:
            ValueError: If the concepts are not usable, the bank is of another base, or the guards leave no room.
        """
        concepts, problem, _ = self._prepared(concepts, bank, kind)
        return {concept.name: self._capacity(concept, problem) for concept in concepts}

    def erase_permanently(
        self, concepts: Iterable[Concept | str], pictures: Pictures | None = None
    ) -> dict[str, Tensor]:
        """Return changed cross-attention weights {parameter name: weight}, of a UNet that has unlearnt the concepts.

        The paper's unconstrained variant (‡), for what must never come back: every weight of the cross-attentions is
        free, nothing is guarded, nothing can be restored. The pipeline is left as it was;
        `pipe.unet.load_state_dict(changed, strict=False)` applies the weights. Use `SepMEConfig.unconstrained()`.

        Raises:
            ValueError: If the concepts are not usable, or the pipeline has no denoiser.
            FloatingPointError: If training diverges.

        Source: arXiv 2402.05947 (unconstrained variant).
        """
        if self.pipe.unet is None:
            raise ValueError("there is nothing that could unlearn for good: this pipeline has no denoiser (unet=None)")
        concepts = as_concepts(concepts)
        pictures = self._checked(pictures or {}, concepts)
        with unedited(self.pipe):
            noisy = [self._pictures(concept, pictures) for concept in concepts]
            return unlearn_permanently(self.pipe, [c.name for c in concepts], noisy, self.config, self.on_step)

    def base(self) -> BaseModel:
        """Describe what this trainer's increments are made on."""
        name = str(self.pipe.config.get("_name_or_path") or type(self.pipe).__name__)
        if Path(name).is_dir():  # whoever gets the bank has no use for a path of this machine
            name = Path(name).name
        text = Fingerprint.of_text(self.pipe)
        projections = heights_and_norms(self._weights) if self._weights else None
        return BaseModel(name, text.doors, text.vocabularies, projections)

    def _prepared(
        self, concepts: Iterable[Concept | str], bank: ConceptBank | None, kind: str | None
    ) -> tuple[list[Concept], Problem, ConceptBank]:
        given = as_concepts(concepts, kind)
        if bank is None:
            bank = ConceptBank(self.base())
        else:
            if self._weights:
                refuse_other_weights(bank, self._weights)
            refuse_other_text(self.pipe, [bank])
        # Those that are most likely to be drawn come first: guards are exact for as many as fit.
        order = (*self.others, *(name for name in bank if name not in bank.always), *(c.name for c in given), *bank)
        names = tuple(dict.fromkeys(order))
        owners = {bare(name): name for name in names}
        for concept in given:
            if taken := [alias for alias in concept.aliases if owners.get(bare(alias), concept.name) != concept.name]:
                raise ValueError(
                    f"{taken} cannot be aliases of {concept.name!r}: there are concepts of these names. Leave the "
                    "aliases out, or erase one concept with all of the names"
                )
        self._wordings |= {c.name: described(c, self.pipe, self._encoded, names, self._company(c)) for c in given}
        worded = [self._wordings[concept.name].concept for concept in given]
        # Together and in one order, so that every process that shares the work gets the same numbers.
        texts = [p for concept in worded for group in (concept.prompts, *concept.anchors) for p in group]
        self._encoded.prefetch([*self.guards, *names, *texts, *(w for c in worded for _, w in c.pairs)])
        return worded, self._problem(names), bank

    def _company(self, concept: Concept) -> Sequence[str]:
        """What few prompts of a concept stand beside; nothing where settings are numbers, for prompts as given."""
        return self._regular.company(concept) if concept.pairs and self.config.is_calibrated else ()

    def _problem(self, names: Sequence[str]) -> Problem:
        """The closed form's problem for concepts that are guarded on these names, at every door."""
        doors = {
            # Without an output factor: a change counts as the embedding's own.
            door: Problem(
                Guards(self.guards, self._encoded.at(door)(self.guards), self.config),
                partial(self._regular.covariance, door=door),
                regular=partial(self._regular.rows, door=door),
            )
            for door in self._encoded.further_doors
        }
        guards = Guards(self.guards, self._encoded(self.guards), self.config)
        problem = Problem(guards, self._regular.covariance, lambda: self._output_factor, self._regular.rows, doors)
        for prompts, embeddings in self._batches(names):
            problem.update(prompts, embeddings)
        return problem

    def _batches(self, prompts: Sequence[str]) -> Iterator[tuple[Sequence[str], Embeddings]]:
        """Encode very many prompts batch by batch."""
        for start in range(0, len(prompts), NAMES_AT_A_TIME):
            batch = prompts[start : start + NAMES_AT_A_TIME]
            yield batch, self._embeddings(batch)

    def _embeddings(self, prompts: Sequence[str]) -> Embeddings:
        """Encode prompts for every door."""
        return {door: self._encoded.at(door)(prompts) for door in (TOKENS, *self._encoded.further_doors)}

    def _plan(self, concept: Concept, problem: Problem) -> Plan:
        adapters = len(problem.guards.names) <= _MOST_ADAPTERS
        return Plan.of(EmbeddedConcept.of(concept, self._encoded), problem, self._solver, adapters)

    def _checked(self, pictures: Pictures, concepts: Sequence[Concept]) -> Pictures:
        names = [concept.name for concept in concepts]
        if unknown := sorted(set(pictures) - set(names)):
            raise ValueError(f"pictures of {unknown}, which are not being erased; being erased: {names}")
        for concept in concepts:
            if self.pipe.unet is not None:
                refuse_other_sizes(self.pipe, concept, pictures.get(concept.name, ()))
        if self._solver.trains:
            refuse_other_schedules(self.pipe.scheduler)
        return pictures

    def _pictures(self, concept: Concept, pictures: Pictures) -> NoisyPictures:
        return NoisyPictures(self.pipe, concept, self.config, self._encoded, pictures.get(concept.name, ()))

    @cached_property
    def _output_factor(self) -> Tensor | None:
        if not self._weights:
            return None
        return output_factor(self._weights.values()).to(self._encoded.device)

    def _capacity(self, concept: Concept, problem: Problem) -> Capacity:
        guards, embedded = problem.guards, EmbeddedConcept.of(concept, self._encoded)
        plan = Plan.of(embedded, problem, SOLVERS["closed_form"])
        increment = entry_of(plan, plan.closed_form()).increment
        meter = LeakageMeter({concept.name: increment}, self._weights, guards.names[problem.n_exact :])
        for prompts, embeddings in self._batches(guards.names):
            meter.update(prompts, embeddings)
        return Capacity(
            concept=concept.name,
            dimensions=guards.width,
            dimensions_left=plan.dimensions_left,
            dimensions_taken=guards.dimensions_taken(embedded),
            names=len(guards.names),
            names_exact=problem.n_exact,
            reach=plan.reach,
            leakage=meter.largest(concept.name),
        )

    def _entries(self, plans: Sequence[Plan], pictures: Pictures) -> list[Entry]:
        """Make the entries of concepts that are solved for together: one, or all of a joint training."""
        task = Task(
            plans,
            self.pipe,
            self._weights,
            self.config,
            lambda concept: self._pictures(concept, pictures),
            self.on_step,
            self._state(plans, pictures) if self._solver.trains else None,
        )
        solutions = zip(plans, self._solver.solve(task), strict=True)
        entries = (
            entry_of(plan, solution.increment, {**solution.metrics, **self._said(plan.concept)})
            for plan, solution in solutions
        )
        return [replace(entry, concept=self._wordings[entry.concept.name].kept) for entry in entries]

    def _said(self, concept: Concept) -> dict[str, Any]:
        """What the wording of a concept says of it: what takes its place, and what is kept beside it."""
        worded = self._wordings[concept.name]
        anchor = {} if worded.anchor is None else {"anchor": worded.anchor}
        near = self._regular.neighbours(concept)
        left_out = {"templates_left_out": len(worded.left_out)} if worded.left_out else {}
        cut = {"aliases_cut": list(worded.cut)} if worded.cut else {}
        return {**anchor, **({"nearest": list(near)} if near else {}), **left_out, **cut}

    def _state(self, plans: Sequence[Plan], pictures: Pictures) -> TrainingState | None:
        """Where the training of these concepts is written down."""
        if self.state is None:
            return None
        soft = self._regular.soft
        soft = soft.covariance if isinstance(soft, SoftGuards) else soft
        images = [image.tobytes() for plan in plans for image in pictures.get(plan.concept.name, ())]
        return TrainingState.of(self.state, plans, self.base(), self.config, soft, images)
