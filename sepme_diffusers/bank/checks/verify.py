"""Whether a bank is what it says: every fault of its files, its increments and its guards, at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.checks.folder import Found, read_checked
from sepme_diffusers.bank.checks.guards import Measured, check_guards
from sepme_diffusers.bank.disk.folder import BankFolder
from sepme_diffusers.bank.entry import BaseModel, Entry, has_exact_guard
from sepme_diffusers.increment.increment import Increment

# Shipped increments change a weight by up to 4 times its norm, and an embedding by up to 30 times.
_HUGE = 300.0


@dataclass(frozen=True)
class Checked:
    """What was found of one concept.

    Args:
        form: "text" or "module"; None if it could not be read.
        rank: Of the increment.
        norm: The largest share ‖ΔW‖ / ‖W‖ of a module; in text-side form the largest by which an embedding can be
            stretched.
        leakage: The largest that was measured on a guard; None without a pipeline.
        faults: What is wrong with it.
    """

    form: str | None = None
    rank: int | None = None
    norm: float | None = None
    leakage: float | None = None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Args:
        folder: Faults of the folder, the manifest, or the bank as a whole.
        concepts: {concept: what was found of it}.
        notes: What could not be checked, and why.
    """

    folder: tuple[str, ...]
    concepts: Mapping[str, Checked]
    notes: tuple[str, ...] = ()

    @property
    def faults(self) -> tuple[str, ...]:
        """Every fault, with the concept that has it."""
        by_concept = (f"concept {name!r}: {fault}" for name, c in self.concepts.items() for fault in c.faults)
        return (*self.folder, *by_concept)

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults


def verify(bank: ConceptBank | str | Path, pipe: Any = None, sample: int | None = None) -> Report:
    """Check a bank, and list everything that is wrong with it.

    Checks the manifest against its schema and its digest, every file against its hash, the folder for anything that
    does not belong there, each increment's numbers, shape, rank and norm, and that what it claims is written down.
    With a pipeline also that the bank fits the base, that no guarded prompt moves, by the pipeline's own text
    encoders, and that adapters do what the increments do, if they are of its denoiser.

    Args:
        bank: A bank, or its folder.
        pipe: The base; only read. Guards are measured in float32, with copies of its text encoders. Where their
            weights were rounded to half precision, a guard may move by up to 2 %, and a note says so.
        sample: Measure the guards of so many concepts, chosen at random: those that should be exact, those that the
            bank says are moved, and so many others. Default: all guards of all concepts; 100 in a bank of more than
            1,000.

    Raises:
        ValueError: If the pipeline has no text encoder, or no embedding for a door at which increments act; or if the
            sample is not at least one concept.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, pocket
        >>> verify(pocket.bank("styles"), SepMEPipeline.from_pretrained(pocket.path())).ok
        True
    """
    if sample is not None and sample < 1:
        raise ValueError(f"sample= is a number of concepts, at least 1, not {sample}")
    if isinstance(bank, ConceptBank):
        found = Found(bank.base, dict(bank))
    else:
        found = read_checked(BankFolder(Path(bank)), pipe)
    if pipe is None:
        measured = Measured(notes=["guards and base were not checked: that takes a pipeline"])
    else:
        measured = check_guards(pipe, found, sample)
    faults = {name: list(of_concept) for name, of_concept in found.by_concept.items()}
    for name, entry in found.entries.items():
        own = _entry_faults(entry, cast(BaseModel, found.base))
        faults[name] = [*faults.get(name, []), *own, *measured.by_concept.get(name, [])]
    checked = {
        name: _checked(found.entries.get(name), found.base, measured.leaks.get(name), tuple(of_concept))
        for name, of_concept in faults.items()
    }
    return Report((*found.faults, *measured.faults), checked, (*found.notes, *measured.notes))


def _checked(
    entry: Entry | None, base: BaseModel | None, leaks: Mapping[str, float] | None, faults: tuple[str, ...]
) -> Checked:
    if entry is None or base is None:
        return Checked(faults=faults)
    increment = entry.increment
    leakage = max(leaks.values()) if leaks else None
    return Checked(increment.form, increment.rank, _norm(increment, base), leakage, faults)


def _entry_faults(entry: Entry, base: BaseModel) -> Iterator[str]:
    norm = _norm(entry.increment, base)
    if not norm <= _HUGE:
        yield f"its increment is huge: {norm:.3g} times what it changes; {_HUGE:g} is the most that is plausible"
    if "leakage" not in entry.metrics:
        yield "its metrics do not say how far it moves its guards (metrics.leakage)"
    if not len(entry.guards):
        yield "it guards no prompt"
    elif not has_exact_guard(entry):
        yield "it guards no prompt exactly (metrics.leakage_of lists all of them), so no pipeline loads it"


def _norm(increment: Increment, base: BaseModel) -> float:
    return max([_own_norm(increment, base), *(_own_norm(part, base) for part in increment.doors.values())])


def _own_norm(increment: Increment, base: BaseModel) -> float:
    # With A = R Q, Q orthonormal rows, ‖C A‖ is ‖C R‖: an (r, r) factor in place of an (r, d) one.
    r = torch.linalg.qr(increment.A.double().T).R.T
    if increment.B is not None:
        return float(torch.linalg.matrix_norm(increment.B.double() @ r, 2))
    norms = {name: max(norm, 1e-12) for name, (_, norm) in (base.projections or {}).items()}
    return max(float((c.double() @ r).norm()) / norms[name] for name, c in (increment.C or {}).items())
