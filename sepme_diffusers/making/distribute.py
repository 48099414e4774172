"""Work shared out over the processes that `accelerate launch` or `torchrun` started; alone, done here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

Job = TypeVar("Job")
Made = TypeVar("Made")


def shared_out(jobs: Sequence[Job], do: Callable[[Job], Made]) -> list[Made]:
    """What `do` makes of each job, in their order, in every process; process p of n does jobs p, p + n, ...

    Raises:
        RuntimeError: In every process, if one of them failed, with what it said; its own error where it failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return [do(job) for job in jobs]
    state, made, failure = PartialState(), {}, None
    try:
        for index in range(state.process_index, len(jobs), state.num_processes):
            made[index] = do(jobs[index])
    except Exception as error:  # the others must not wait for ever
        failure = error
    gathered = gather_object([(made, failure and f"{type(failure).__name__}: {failure}")])
    if failure is not None:
        raise failure
    if said := [text for _, text in gathered if text]:
        raise RuntimeError(f"another process failed, so nothing was made: {'; '.join(said)}")
    everything = {index: one for some, _ in gathered for index, one in some.items()}
    return [everything[index] for index in range(len(jobs))]
