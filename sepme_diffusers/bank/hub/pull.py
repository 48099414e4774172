"""Pull a bank from the Hugging Face Hub, or a part of it, all of one commit."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import (
    constants,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from sepme_diffusers.bank.contents import Contents, read
from sepme_diffusers.bank.disk.folder import BankFolder, hashes
from sepme_diffusers.bank.disk.layout import MANIFEST, SIGNATURE
from sepme_diffusers.bank.disk.manifest import records_in
from sepme_diffusers.bank.entry import Origin
from sepme_diffusers.bank.errors import BankError, DownloadError

# huggingface_hub lets its HTTP library's errors through when a transfer breaks off; which library that is, depends on
# its version.
_BROKEN_OFF: type[Exception] = HfHubHTTPError.__bases__[0]


def pull(
    repository: str,
    wanted: list[str] | None,
    subfolder: str,
    public_key: str | Path | None,
    options: Mapping[str, Any],
) -> tuple[Contents, Origin | None]:
    """Download a repository's bank, with the files of the wanted concepts alone.

    Args:
        repository: Its id.
        wanted: Names, or None for all.
        subfolder: Where in the repository the bank is.
        public_key: See `contents.read`.
        options: Passed on to `snapshot_download`.

    Returns:
        The bank, and what a push must know of where it came from: None for a bank in a subfolder, for a push goes to
        the top of a repository.

    Raises:
        BankError: If the bank cannot be trusted or understood, even after damaged files were downloaded again.
        DownloadError: If it could not be downloaded whole.
    """
    download = _Download(repository, wanted, subfolder, public_key, options)
    try:
        contents, records = download.read()
    except DownloadError:
        raise
    except BankError:
        if options.get("local_files_only") or constants.is_offline_mode() or not download.repair():
            raise
        contents, records = download.read()
    return contents, None if subfolder else Origin(repository, contents.always, contents.entries.outlines(), records)


@dataclass
class _Download:
    """The download of a bank, all of one commit."""

    repository: str
    wanted: list[str] | None
    subfolder: str
    public_key: str | Path | None
    options: Mapping[str, Any]
    snapshot: Path | None = None

    def read(self) -> tuple[Contents, dict[str, Any]]:
        """Read the wanted part of the bank, and every concept's record."""
        self.snapshot = self._fetch([MANIFEST] if self.public_key is None else [MANIFEST, SIGNATURE], self.options)
        bank = self.bank
        # The snapshot's folder is named by its commit: a push in between must not mix two banks.
        self._fetch(hashes(bank.manifest(self.wanted)), self._pinned())
        return read(bank.folder, self.wanted, self.public_key), records_in(bank.manifest_bytes())

    def repair(self) -> bool:
        """Download damaged files again, for the cache trusts what it once stored; tell whether there were any."""
        if self.snapshot is None:
            return False
        damaged = self._repair_found()
        if damaged == [MANIFEST]:
            self._repair_found()  # a manifest that is whole again has the hashes by which the other files are judged
        return bool(damaged)

    def _repair_found(self) -> list[str]:
        damaged = self.bank.damaged(self.wanted)
        if self.public_key is not None and not damaged:
            damaged = [SIGNATURE]  # it has no hash, and may be what is wrong
        if damaged:
            self._fetch(damaged, {**self._pinned(), "force_download": True})
        return damaged

    @property
    def bank(self) -> BankFolder:
        return BankFolder(self._downloaded / self.subfolder)

    def _pinned(self) -> dict[str, Any]:
        return {**self.options, "revision": self._downloaded.name}

    @property
    def _downloaded(self) -> Path:
        return cast(Path, self.snapshot)  # `read` has set it before anything asks

    def _fetch(self, files: Iterable[str], options: Mapping[str, Any]) -> Path:
        prefix = f"{self.subfolder.strip('/')}/" if self.subfolder else ""
        return _snapshot(self.repository, [prefix + glob.escape(file) for file in files], options)


def _snapshot(repository: str, patterns: list[str], hub: Mapping[str, Any]) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, **hub))
    except HFValidationError as error:
        raise BankError(f"{repository!r} is neither a folder nor a repository id: {error}") from error
    except (HfHubHTTPError, FileNotFoundError):
        raise  # the Hub's own answer, or what the cache lacks: said best by huggingface_hub
    except (_BROKEN_OFF, OSError) as error:
        raise DownloadError(f"the download of {repository!r} broke off: {error}") from error
