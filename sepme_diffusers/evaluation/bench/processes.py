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
    """Read the memory that this process has in RAM, in bytes; where the system does not say, the most that it had."""
    return _of_status("VmRSS") or peak_resident()


def peak_resident() -> int:
    """Read the most memory that this process has had in RAM, in bytes."""
    # Not ru_maxrss, which on Linux a process inherits from the one that starts it.
    if peak := _of_status("VmHWM"):
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _of_status(what: str) -> int:
    """Read a number of bytes from what Linux says of this process; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:")), 0)
