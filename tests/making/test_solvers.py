"""The registry of solvers."""

from typing import get_args

from sepme_diffusers.increment.config import Solver
from sepme_diffusers.making.solvers import SOLVERS


def test_the_registry_knows_every_name_that_a_config_may_have():
    assert set(SOLVERS) == set(get_args(Solver))
    assert all(solver.name == name and solver.reference for name, solver in SOLVERS.items())
