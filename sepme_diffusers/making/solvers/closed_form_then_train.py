"""Training by the paper's correlation loss, from the closed form."""

from __future__ import annotations

from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.plan import Plan
from sepme_diffusers.making.solvers.train import Train


class ClosedFormThenTrain(Train):
    """Scale the closed form to where the correlation is about zero, and train on from there."""

    name = "closed_form+train"
    reference = "Zhao et al., arXiv 2402.05947, started from the closed form"
    starts_from_closed_form = True

    def start(self, plan: Plan) -> Increment:
        """The plan's closed form."""
        return plan.closed_form()
