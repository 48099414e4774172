"""Measures in a process of their own, and the most memory that a process has had."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process: its memory starts empty, and all of it is given back."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def resident() -> int:
    """Read the memory that this process has in RAM, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


def peak_resident() -> int:
    """Read the most memory that this process has had in RAM, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss, which on Linux a process inherits from the one that starts it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
