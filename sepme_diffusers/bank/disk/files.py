"""Files that are written wholly or not at all, and are on the disk when the call returns."""

from __future__ import annotations

import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

# Files written out at once.
_AT_A_TIME = 16


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, new or in place of the one that has its name: whoever opens it finds the old one or the new one.

    Args:
        path: The file, in a folder that is there.
        data: What it shall hold.

    Raises:
        OSError: If it cannot be written. The old file stays as it was.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write_file(unfinished, data)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    persist(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file.

    Raises:
        FileExistsError: If there is a file of this name.
        OSError: If it cannot be written.
    """
    with open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def persist(folder: Path) -> None:
    """Make a folder's names survive a loss of power. Windows has no such call."""
    with suppress(OSError):
        _sync(folder, os.O_RDONLY)


def persist_tree(folder: Path) -> None:
    """Make all files and folders in a folder survive a loss of power: many at a time, which the system joins.

    Raises:
        OSError: If a file cannot be written out.
    """
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for _ in pool.map(_persist, [folder, *folder.rglob("*")]):
            pass  # only the errors matter


def _persist(path: Path) -> None:
    if path.is_dir():
        persist(path)
    else:
        _sync(path, os.O_RDWR)  # Windows writes out what can be written to alone


def _sync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
