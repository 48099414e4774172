"""HeldFile: a file that stays readable whatever becomes of its name."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from io import BytesIO, FileIO
from pathlib import Path

_AT_A_TIME = 2**20


class HeldFile:
    """A file that is open, or was read. Removing or replacing it in its folder changes nothing of what is read here.

    It is not mapped into memory: a process that reads the mapping of a file that somebody cut short dies of it.

    Args:
        path: Where it was found, for messages.
        stream: Open for reading, without a buffer.
    """

    def __init__(self, path: Path, stream: FileIO | BytesIO) -> None:
        self.path = path
        self.size = stream.seek(0, os.SEEK_END)
        self._stream, self._lock = stream, threading.Lock()
        weakref.finalize(self, stream.close)

    @classmethod
    def opened(cls, path: Path) -> HeldFile:
        """Open a file.

        Raises:
            OSError: If it cannot be opened.
        """
        return cls(path, FileIO(path))

    def in_memory(self) -> HeldFile:
        """Read the file, which need not be open any longer.

        Raises:
            OSError: If it cannot be read.
        """
        return HeldFile(self.path, BytesIO(self.read(0, self.size)))

    def read(self, start: int, count: int) -> bytes:
        """Read `count` bytes from `start` on; fewer where the file ends.

        Raises:
            OSError: If they cannot be read.
        """
        if hasattr(os, "pread") and isinstance(self._stream, FileIO):
            # Processes that were forked share one position in the file.
            return os.pread(self._stream.fileno(), count, start)
        with self._lock:
            self._stream.seek(start)
            return self._stream.read(count)

    def sha256(self) -> str:
        """Hash what the file holds now: SHA-256, in hexadecimal digits.

        Raises:
            OSError: If it cannot be read.
        """
        hashed, place = hashlib.sha256(), 0
        while part := self.read(place, _AT_A_TIME):
            hashed.update(part)
            place += len(part)
        return hashed.hexdigest()
