"""Entries made one at a time, and a bank of any number of concepts out of their embeddings alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from torch import Tensor

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.embedded import EmbeddedConcept
from sepme_diffusers.making.measure import Embeddings, LeakageMeter
from sepme_diffusers.making.plan import Plan, Problem, as_increment
from sepme_diffusers.making.solvers.closed_form import ClosedForm

Batches = Callable[[], Iterable[tuple[Sequence[str], Embeddings]]]
"""Starts to give prompts and their embeddings by door, batch by batch; each call gives the same ones."""


def entry_of(plan: Plan, increment: Increment, metrics: Mapping[str, Any] | None = None) -> Entry:
    """Make the entry of an increment that was solved for: with its gate, and with what it does at further doors.

    What it leaks is not measured yet, see `measured`.

    Args:
        plan: What it was solved for.
        increment: The solution at the token door.
        metrics: What the solver reports.

    Raises:
        ValueError: If its gate cannot be set.
    """
    problem = plan.problem
    gated, readings = problem.gated(increment, plan.embedded)
    known = {"dimensions_left": plan.dimensions_left, "reach": plan.reach, **readings, **(metrics or {})}
    adapter = None if plan.adapter is None else as_increment(plan.adapter)
    finished = replace(gated, doors=plan.doors)
    return Entry(plan.concept, finished, plan.config, problem.guard_set(), known, adapter)


def measured(
    entries: Iterable[Entry], problem: Problem, hard: Embeddings, names: Batches, weights: Mapping[str, Tensor] | None
) -> list[Entry]:
    """Add to the entries' metrics how far each moves the other names and the hard guards.

    Args:
        entries: The entries.
        problem: What they were made for.
        hard: The embeddings of the hard guards.
        names: Gives the names that are guarded.
        weights: W_m (d_out, d) of the denoiser by module name, for per-module increments.
    """
    entries = list(entries)
    damped = problem.guards.names[problem.n_exact :]
    meter = LeakageMeter({entry.concept.name: entry.increment for entry in entries}, weights, damped)
    adapters = {entry.concept.name: entry.adapter for entry in entries if entry.adapter is not None}
    without_gate = problem.guards.without_gate()
    of_adapters = LeakageMeter(adapters, damped=without_gate.names[without_gate.n_exact :])
    for each in (meter, of_adapters) if adapters else (meter,):
        each.update(problem.guards.hard, hard)
        for prompts, embeddings in names():
            each.update(prompts, embeddings)
    result = []
    for entry in entries:
        name = entry.concept.name
        further = {"adapter_leakage": of_adapters.metrics(name)["leakage"]} if name in adapters else {}
        result.append(replace(entry, metrics={**entry.metrics, **meter.metrics(name), **further}))
    return result


def bank_from_embeddings(
    base: BaseModel,
    problem: Problem,
    hard: Embeddings,
    names: Batches,
    concepts: Iterable[EmbeddedConcept],
    compact: bool = False,
) -> ConceptBank:
    """Make a bank in closed form out of embeddings that are given piece by piece; nothing large is kept of them.

    Args:
        base: What the embeddings are of.
        problem: The regression, with the hard guards; the names are taken in here.
        hard: The embeddings of the hard guards, by door.
        names: Gives the names that every increment guards, the concepts' own ones among them.
        concepts: The concepts, each taken when it is its turn.
        compact: Whether to round the increments to float16, see `Increment.compact`.

    Raises:
        ValueError: If a concept cannot be erased.
    """
    for prompts, embeddings in names():
        problem.update(prompts, embeddings)

    def made() -> Iterator[Entry]:
        for concept in concepts:
            plan = Plan.of(concept, problem, ClosedForm())
            solved = plan.closed_form()
            entry = entry_of(plan, solved.compact() if compact else solved)
            # What is kept is copied when all that is large is free again. Kept between large pieces of memory, it
            # would stop the allocator from joining them, and memory would grow by far more than what is kept.
            del plan, solved, concept
            yield replace(entry, increment=deepcopy(entry.increment), adapter=deepcopy(entry.adapter))

    return ConceptBank(base).with_entries(measured(made(), problem, hard, names, None))
