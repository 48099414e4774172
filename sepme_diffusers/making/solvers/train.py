"""Training by the paper's correlation loss, from zero."""

from __future__ import annotations

from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.learner import Learner
from sepme_diffusers.making.loop import learn
from sepme_diffusers.making.plan import Plan
from sepme_diffusers.making.solvers.solver import Solution, Task


class Train:
    """Minimise the correlation loss until the stop rule applies."""

    name = "train"
    reference = "Zhao et al., arXiv 2402.05947"
    trains = True
    starts_from_closed_form = False

    def solve(self, task: Task) -> list[Solution]:
        """Train the plans' increments together, or return what an earlier run finished with.

        Raises:
            FloatingPointError: If training diverges.
        """
        if task.state is not None and (finished := task.state.finished()) is not None:
            return [Solution(*increment_and_metrics) for increment_and_metrics in finished]
        learners = [
            Learner(
                plan.concept.name,
                plan.basis(task.config, task.weights),
                task.weights,
                task.pictures(plan.concept),
                task.config,
                self.start(plan),
                plan.doors,
            )
            for plan in task.plans
        ]
        learn(task.pipe, learners, task.config, task.on_step, task.state)
        solutions = [Solution(learner.increment(), learner.metrics()) for learner in learners]
        if task.state is not None:
            task.state.finish([(solution.increment, solution.metrics) for solution in solutions])
        return solutions

    def start(self, plan: Plan) -> Increment | None:
        """The increment that training starts from; None for zero."""
        return None
