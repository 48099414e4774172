"""Solvers by the name that `SepMEConfig.solver` knows them by. A new one is a file here and a line in `SOLVERS`."""

from __future__ import annotations

from sepme_diffusers.making.solvers.closed_form import ClosedForm
from sepme_diffusers.making.solvers.closed_form_then_train import ClosedFormThenTrain
from sepme_diffusers.making.solvers.solver import Solution, Solver, Task
from sepme_diffusers.making.solvers.train import Train

SOLVERS: dict[str, Solver] = {solver.name: solver for solver in (Train(), ClosedForm(), ClosedFormThenTrain())}

__all__ = ["SOLVERS", "Solution", "Solver", "Task"]
