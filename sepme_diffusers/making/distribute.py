"""Work shared out over the processes that `accelerate launch` or `torchrun` started; alone, done here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

Job = TypeVar("Job")
Result = TypeVar("Result")


def shared_out(jobs: Sequence[Job], do: Callable[[Job], Result]) -> list[Result]:
    """Return what `do` gives for each job, in their order, in every process; process p of n does jobs p, p + n, ...

    Raises:
        RuntimeError: In every process, if one of them failed, with that one's message; its own error where it failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return [do(job) for job in jobs]
    state, results, failure = PartialState(), {}, None
    try:
        for index in range(state.process_index, len(jobs), state.num_processes):
            results[index] = do(jobs[index])
    except Exception as error:  # the others must not wait for ever
        failure = error
    gathered = gather_object([(results, failure and f"{type(failure).__name__}: {failure}")])
    if failure is not None:
        raise failure
    if messages := [message for _, message in gathered if message]:
        raise RuntimeError(f"another process failed, so nothing was made: {'; '.join(messages)}")
    by_index = {index: result for results_of_process, _ in gathered for index, result in results_of_process.items()}
    return [by_index[index] for index in range(len(jobs))]
