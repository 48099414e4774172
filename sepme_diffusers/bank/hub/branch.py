"""A branch of a Hub repository: what a bank's push finds there, and where it puts what is new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
)
from huggingface_hub.errors import RepositoryNotFoundError

from sepme_diffusers.bank.disk.folder import BankFolder, sha256
from sepme_diffusers.bank.disk.layout import ASSETS, CARD, MANIFEST
from sepme_diffusers.bank.errors import BankError

# What a repository may hold before the first push: the Hub makes the one, people write the other.
_EMPTY = {".gitattributes", CARD}


def prepare(api: HfApi, repository: str, private: bool | None, branch: str | None) -> str:
    """Make the repository and the branch where they are missing; return the repository's whole id."""
    if "/" not in repository:
        repository = f"{api.whoami()['name']}/{repository}"
    try:
        public = not api.model_info(repository).private
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private, exist_ok=True)
        public = False
    if private and public:
        raise ValueError(f"{repository!r} exists and is public; make it private first, or push without private=True")
    if branch is not None and not branch.startswith("refs/"):
        api.create_branch(repository, branch=branch, exist_ok=True)
    return repository


@dataclass(frozen=True)
class Head:
    """What a branch holds at one commit."""

    commit: str
    files: frozenset[str]
    manifest: dict[str, Any] | None
    data: bytes
    card: str | None

    @classmethod
    def of(cls, api: HfApi, repository: str, revision: str | None, cache: Path) -> Head:
        info: Any = api.model_info(repository, revision=revision)
        files = frozenset(file.rfilename for file in info.siblings)
        if MANIFEST not in files and files - _EMPTY:
            raise BankError(f"{repository!r} holds other files and no concept bank; choose another repository")
        if not (there := [file for file in (MANIFEST, CARD) if file in files]):
            return cls(info.sha, files, None, b"", None)
        snapshot = api.snapshot_download(repository, revision=info.sha, allow_patterns=there, cache_dir=cache)
        contents = {file: (Path(snapshot) / file).read_bytes() for file in there}
        manifest = BankFolder(Path(snapshot)).manifest() if MANIFEST in files else None
        card = contents[CARD].decode("utf-8", errors="replace") if CARD in files else None
        return cls(info.sha, files, manifest, contents.get(MANIFEST, b""), card)

    @property
    def records(self) -> dict[str, Any]:
        """{concept: its record}."""
        return self.manifest["concepts"] if self.manifest else {}

    @property
    def always(self) -> list[str]:
        """What the bank there always erases."""
        return self.manifest["policy"]["always"] if self.manifest else []


class Upload:
    """Where a push puts what it draws up: a folder here, of which everything goes to the Hub.

    Args:
        head: What the Hub has. What is there already stays there.
        folder: A new one.
    """

    def __init__(self, head: Head, folder: Path) -> None:
        self.former, self.folder = head.manifest, folder
        self._there = head.files
        self._taken = {ASSETS, *(file.split("/")[0] for file in head.files)}
        folder.mkdir()

    def keep(self, name: str, files: Mapping[str, str]) -> bool:
        """Go on using a shard or folder that is on the Hub; tell whether it is."""
        return files.keys() <= self._there

    def put(self, name: str, data: bytes) -> None:
        """Put a shard there, unless the Hub has it."""
        if name not in self._there:
            (self.folder / name).write_bytes(data)

    def put_folder(self, slug: str, concept: str, files: Mapping[str, bytes]) -> str:
        """Put a concept's folder there: where the one that it replaces is, or else where nothing is."""
        former = self.former["concepts"].get(concept) if self.former else None
        other = sha256(b"\0".join([concept.encode(), *files.values()]))[:12]
        free = [name for name in (slug, f"{slug}-{other}", f"{slug}-{other}-{other}") if name not in self._taken]
        folder = next(iter([*folders_of(former or {}), *free]))
        self._taken.add(folder)
        (self.folder / folder).mkdir(exist_ok=True)
        for file, data in files.items():
            (self.folder / folder / file).write_bytes(data)
        return folder


def folders_of(record: Mapping[str, Any]) -> list[str]:
    """The folders of a record: a per-module increment's, an adapter's; a record has one at most."""
    return [part["folder"] for part in (record, record.get("adapter", {})) if "folder" in part]
