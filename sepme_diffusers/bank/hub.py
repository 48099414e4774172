"""A bank on the Hugging Face Hub: pulled in part, pushed in part, and never over what others pushed meanwhile."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from sepme_diffusers.bank.adapters import MOST, KnownDenoiser, choose
from sepme_diffusers.bank.card import Picture, model_card
from sepme_diffusers.bank.contents import Contents, Layout, read, write
from sepme_diffusers.bank.entry import Origin
from sepme_diffusers.bank.errors import BankError, PolicyError
from sepme_diffusers.bank.folder import BankFolder, hashes
from sepme_diffusers.bank.layout import ASSETS, CARD, MANIFEST, SIGNATURE
from sepme_diffusers.bank.manifest import records_in, seal
from sepme_diffusers.bank.records import TABLES, Tables, base_from_dict, base_to_dict
from sepme_diffusers.bank.signing import sign
from sepme_diffusers.text.names import listed

# What a repository may hold before the first push: the Hub makes the one, people write the other.
_EMPTY = {".gitattributes", CARD}
# As often as others push in between before this gives up.
_ATTEMPTS = 5
_MOVED_ON = 412
# huggingface_hub lets its HTTP library's errors through when a transfer breaks off; which library that is, depends on
# its version.
_BROKEN_OFF: type[Exception] = HfHubHTTPError.__bases__[0]


class DownloadError(BankError):
    """A bank could not be downloaded whole."""


class PushConflict(RuntimeError):
    """The Hub holds another version of a concept than the one that a push was made from."""


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


@dataclass(frozen=True)
class HubBank(Contents):
    """What a bank holds, and what it knows of the Hub repository that it came from. Immutable.

    Args:
        base: See `Contents`, as `entries` and `always`.
        entries: See there.
        always: See there.
        origin: The repository as last seen; None for a bank that comes from elsewhere. No part of what the bank is.
        denoiser: The one that adapters are made for; None if it is not known. No part of what the bank is.
    """

    origin: Origin | None = field(default=None, compare=False)
    denoiser: KnownDenoiser | None = field(default=None, compare=False)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        concepts: Iterable[str] | None = None,
        remove: Iterable[str] = (),
        license: str | None = None,
        pictures: Iterable[Picture] = (),
        dtype: torch.dtype | None = None,
        pack: bool = False,
        adapters: bool | None = None,
        base: Any = None,
        signing_key: str | Path | None = None,
        endpoint: str | None = None,
    ) -> CommitInfo:
        """Publish the bank on the Hugging Face Hub, in one commit that uploads only what is new there.

        Concepts on the Hub that this bank lacks stay. What others pushed since this bank was pulled stays as well: the
        push is made again on top of theirs, unless both changed the same concept. A bank that was pulled remembers
        what it pushed (its `origin`), so that its next push is no conflict with this one. Banks that were derived from
        it before know nothing of that.

        Args:
            repo_id: The repository; made if missing.
            private: Whether a repository that is made is private. True refuses a public one that exists.
            token: As for every function of huggingface_hub. Default: the one that was logged in with.
            revision: The branch; made if missing. Default: "main".
            create_pr: Open a pull request instead of committing to the branch.
            commit_message: Default: it names the concepts.
            concepts: Push these alone. Naming one that the Hub has allows a bank that was not pulled to replace it.
            remove: Concepts to take off the Hub.
            license: For the card. Default: what the card on the Hub says.
            pictures: For the card, beside those it has.
            dtype: Of B or C. Default: as they are.
            pack: Upload all of the bank's increments in few new shards. Otherwise those that are new are uploaded as
                one small shard, and the rows of those that are gone stay in the older ones.
            adapters: Whether concepts also have PEFT LoRAs, see `save_pretrained`. True makes those of this bank that
                the Hub lacks, and False takes them off the Hub. Default: as there; the 200 concepts are the Hub's.
            base: See `save_pretrained`.
            signing_key: A private key (PEM file) to sign the bank with, as it will be on the Hub: what others pushed
                is signed too. Without one, a signature on the Hub that is no longer true is removed.
            endpoint: Of the Hub.

        Raises:
            PushConflict: If the Hub holds another version of a concept than this bank knows. Nothing is published.
            BankError: If the repository holds something else than a bank, or a bank for another base.
            KeyError: If the bank lacks one of `concepts`, or the Hub one of `remove`.
            PolicyError: If it would leave out or remove a concept that a policy always erases.
            TypeError: If `concepts` or `remove` is a single string.
            ValueError: If `private` is asked for and the repository is public; or adapters are asked for and no
                denoiser is known, or they cannot be made for this `base`.
            HfHubHTTPError: What huggingface_hub raises: not found, not allowed, ...
        """
        named = None if concepts is None else tuple(dict.fromkeys(listed(concepts)))
        if unknown := [name for name in named or () if name not in self.entries]:
            raise KeyError(f"cannot push {unknown}: the bank has {list(self.entries)}")
        removed = tuple(listed(remove))
        how = Layout(dtype, True, *choose(self.base, self.entries, self.denoiser, adapters, base))
        api = HfApi(
            endpoint=endpoint, token=token, library_name="sepme_diffusers", library_version=version("sepme_diffusers")
        )
        repository = _prepare(api, repo_id, private, None if create_pr else revision)
        with TemporaryDirectory(prefix="sepme-push-") as scratch:
            folder = Path(scratch) / "bank"
            change = _Change.of(self, self.origin, repository, named, removed, folder, how, pack, adapters)
            dress = _Dress(repository, license, tuple(pictures), signing_key)
            expected = None
            for attempt in range(_ATTEMPTS):
                head = _Head.of(api, repository, revision, Path(scratch) / "cache")
                expected = change.expected(head) if expected is None else expected
                manifest = _merged(head, change, expected)
                files = dress.files(head, manifest, Path(scratch) / f"attempt-{attempt}")
                try:
                    info = api.create_commit(
                        repository,
                        [*_operations(head, manifest, change), *files],
                        commit_message=commit_message or change.message,
                        revision=revision,
                        create_pr=create_pr,
                        parent_commit=head.commit,
                    )
                except HfHubHTTPError as error:
                    if error.response.status_code != _MOVED_ON:
                        raise
                    continue
                if not create_pr:
                    object.__setattr__(self, "origin", change.origin_after(manifest, self.origin))
                return info
        raise PushConflict(
            f"others pushed to {repository!r} {_ATTEMPTS} times in a row meanwhile; nothing was published"
        )


def _prepare(api: HfApi, repository: str, private: bool | None, branch: str | None) -> str:
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
class _Head:
    """What a branch holds at one commit."""

    commit: str
    files: frozenset[str]
    manifest: dict[str, Any] | None
    data: bytes
    card: str | None

    @classmethod
    def of(cls, api: HfApi, repository: str, revision: str | None, cache: Path) -> _Head:
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
        return self.manifest["concepts"] if self.manifest else {}

    @property
    def always(self) -> list[str]:
        return self.manifest["policy"]["always"] if self.manifest else []

    def inside(self, folder: str) -> set[str]:
        return {file for file in self.files if file.startswith(f"{folder}/")}


@dataclass(frozen=True)
class _Change:
    """What a push wants to be different on the Hub: concepts, written to a folder as a bank is, and removals."""

    bank: Contents
    origin: Origin | None
    named: tuple[str, ...] | None
    remove: tuple[str, ...]
    pack: bool
    adapters: bool | None
    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def of(
        cls,
        bank: Contents,
        origin: Origin | None,
        repository: str,
        named: tuple[str, ...] | None,
        remove: tuple[str, ...],
        folder: Path,
        how: Layout,
        pack: bool,
        adapters: bool | None,
    ) -> _Change:
        origin = origin if origin and origin.repository == repository else None
        pulled, seen = (origin.outlines, origin.records) if origin else ({}, {})
        bare = {name for name, record in seen.items() if adapters and not _folders(record)}
        outlines = bank.entries.outlines()
        changed = [name for name in outlines if pack or name in bare or pulled.get(name) is not outlines[name]]
        names = changed if named is None else named
        if both := sorted(set(names) & set(remove)):
            raise ValueError(f"{both} cannot be both pushed and removed")
        write(Contents(bank.base, bank.entries.only(names)), folder, how)
        return cls(bank, origin, named, remove, pack, adapters, folder, BankFolder(folder).manifest())

    @property
    def records(self) -> dict[str, Any]:
        return self.manifest["concepts"]

    @property
    def message(self) -> str:
        parts = {"Push": self.records, "Remove": self.remove}
        return "; ".join(f"{verb} {_shown(names)}" for verb, names in parts.items() if names) or "Update the card"

    def refuses_adapter(self, name: str, n_concepts: int) -> bool:
        """Tell whether a concept of a bank of so many shall have no adapter on the Hub."""
        if self.adapters is None:
            return n_concepts > MOST
        return not self.adapters and name in (self.bank.entries if self.named is None else self.named)

    @property
    def relaxed(self) -> set[str]:
        """What the bank's holder has taken out of the policy. A push of some concepts alone does not change it."""
        return set(self.origin.always) - set(self.bank.always) if self.origin and self.named is None else set()

    def expected(self, head: _Head) -> dict[str, Any]:
        """Return the records that this change replaces or removes, as its maker last saw them; None for no record.

        What is named is known by being named; for the rest, a bank only knows what it was pulled with.
        """
        seen = self.origin.records if self.origin else head.records
        pulled = self.origin.outlines if self.origin else {}
        known = {*pulled, *(self.named or ()), *self.remove}
        if unknown := [name for name in self.remove if name not in {**seen, **head.records}]:
            raise KeyError(f"cannot remove {unknown}: the bank on the Hub has {list(head.records)}")
        return {name: seen.get(name) if name in known else None for name in (*self.records, *self.remove)}

    def origin_after(self, manifest: Mapping[str, Any], origin: Origin | None) -> Origin | None:
        """Return what the bank knows once this is pushed: its next push is no conflict with this one."""
        if self.origin is None or origin is None:
            return origin
        records = {name: manifest["concepts"][name] for name in self.records}
        outlines = {name: self.bank.entries.outline(name) for name in self.records}
        return replace(origin, records={**origin.records, **records}, outlines={**origin.outlines, **outlines})


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _merged(head: _Head, change: _Change, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest that the Hub shall have; the present one itself, if nothing is different."""
    _refuse_conflicts(head, change, expected)
    if head.manifest is not None:
        per_module = _has_per_module(head.records) or _has_per_module(change.records)
        _refuse_other_base(head.manifest["base"], change.manifest["base"], per_module)
    records = {name: record for name, record in head.records.items() if name not in change.remove}
    taken = {ASSETS, *(file.split("/")[0] for file in head.files)}
    for name, record in change.records.items():
        former = records.get(name)
        if change.pack or not _alike(record, former):
            records[name] = _placed(record, former, taken)
        elif not _same_adapter(record, former):
            records[name] = _placed({**records[name], "adapter": record["adapter"]}, former, taken)
    for name in [name for name, r in records.items() if "adapter" in r and change.refuses_adapter(name, len(records))]:
        records[name] = {key: value for key, value in records[name].items() if key != "adapter"}
    always = [name for name in dict.fromkeys((*head.always, *change.bank.always)) if name not in change.relaxed]
    if missing := [name for name in always if name not in records]:
        raise PolicyError(f"the bank's policy always erases {missing}; the bank on the Hub would lack them")
    merged = {
        **change.manifest,
        "base": _base(head, change),
        "policy": {**change.manifest["policy"], "always": always},
        **_tables(head, change, records),
        "concepts": records,
    }
    if head.manifest and all(head.manifest[key] == merged[key] for key in ("base", "policy", "concepts")):
        return head.manifest
    return merged


def _tables(head: _Head, change: _Change, records: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shards and tables that records refer to, of the bank on the Hub or of the change."""
    tables, shards = Tables(), {}
    manifests = [head.manifest] if head.manifest else []
    known = {id(m): Tables.of(m) for m in (*manifests, change.manifest)}
    # The name of a shard says what is in it.
    known_shards = {**change.manifest["shards"], **(head.manifest["shards"] if head.manifest else {})}
    for name, record in records.items():
        theirs = head.manifest and _refers_alike(record, head.records.get(name))
        tables.adopt(record, known[id(head.manifest if theirs else change.manifest)])
        if "shard" in record:
            shards[record["shard"]] = known_shards[record["shard"]]
    return {"shards": shards, **{table: getattr(tables, table) for table in TABLES}}


def _refers_alike(record: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    """Tell whether two records refer to the same in the tables."""
    return other is not None and all(record[key] == other[key] for key in ("wording", "guards", "config"))


def _refuse_conflicts(head: _Head, change: _Change, expected: Mapping[str, Any]) -> None:
    conflicts = [
        name
        for name, record in expected.items()
        if not _alike(head.records.get(name), record) and not _alike(head.records.get(name), change.records.get(name))
    ]
    if not conflicts:
        return
    if change.origin is None and change.named is None:
        raise PushConflict(
            f"the Hub has other versions of {conflicts}, and this bank was not pulled from there. Pull it and change "
            "that, or name them in concepts= to replace what the Hub has. Nothing was published"
        )
    raise PushConflict(
        f"{conflicts} changed on the Hub since this push's bank was made or pulled. Pull the bank again and make the "
        "change on that one. Nothing was published"
    )


def _refuse_other_base(theirs: Mapping[str, Any], mine: Mapping[str, Any], per_module: bool) -> None:
    """Check that the bank on the Hub and this one are for one base: for the same text encoders, if that is enough."""
    there, here = base_from_dict(theirs).fingerprint, base_from_dict(mine).fingerprint
    if reason := there.differs(here) if per_module else there.text_side.differs(here):
        raise BankError(
            f"the bank on the Hub is for {theirs['name']!r} and this one for {mine['name']!r}, another base "
            f"({reason}); push it to a repository of its own"
        )


def _base(head: _Head, change: _Change) -> dict[str, Any]:
    """Name the base for the bank on the Hub: as the push does, or as it is there if only some are pushed.

    What one of the two does not know, the other may.
    """
    mine = change.manifest["base"]
    theirs = head.manifest["base"] if head.manifest else mine
    first, second = (theirs, mine) if change.named is not None or _has_per_module(head.records) else (mine, theirs)
    return base_to_dict(base_from_dict(first).completed_by(base_from_dict(second)))


def _has_per_module(records: Mapping[str, Any]) -> bool:
    return any(record["form"] == "module" for record in records.values())


_WHERE = ("shard", "rows", "folder")


def _alike(record: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Tell whether two records say the same of an erasure, wherever its files are."""
    if record is None or other is None:
        return record is other
    first, second = ({k: v for k, v in each.items() if k not in (*_WHERE, "adapter")} for each in (record, other))
    return first == second


def _same_adapter(record: Mapping[str, Any], former: Mapping[str, Any] | None) -> bool:
    """Tell whether a record brings no adapter that the former one lacks."""
    if former is None or "adapter" not in record:
        return True
    return {**record["adapter"], "folder": ""} == {**former.get("adapter", {}), "folder": ""}


def _placed(record: Mapping[str, Any], former: Mapping[str, Any] | None, taken: set[str]) -> dict[str, Any]:
    """Choose where the folder of a record goes: the concept's former one, or one that nothing on the Hub has.

    An adapter that is there is kept while its increment is the same.
    """
    placed = dict(record)
    if former is not None and "adapter" in former and former["digest"] == record["digest"]:
        placed.setdefault("adapter", former["adapter"])
    for part in ("folder", "adapter"):
        if part not in record:
            continue
        folder = record["folder"] if part == "folder" else record["adapter"]["folder"]
        kept = next(iter(_folders(former or {})), None)
        if kept is None and folder in taken:
            folder = f"{folder}-{record['digest'][:12]}"
        taken.add(kept or folder)
        placed[part] = kept or folder if part == "folder" else {**record["adapter"], "folder": kept or folder}
    return placed


def _folders(record: Mapping[str, Any]) -> list[str]:
    """The folders of a record: a per-module increment's, an adapter's; a record has one at most."""
    return [part["folder"] for part in (record, record.get("adapter", {})) if "folder" in part]


def _operations(
    head: _Head, manifest: Mapping[str, Any], change: _Change
) -> Iterator[CommitOperationAdd | CommitOperationDelete]:
    """List the shards and the concepts' files that a commit adds, replaces and deletes."""
    records, added = manifest["concepts"], set()
    for shard in manifest["shards"]:
        if shard not in head.files:
            yield CommitOperationAdd(shard, change.folder / shard)
    for name, record in change.records.items():
        if records[name] is head.records.get(name):
            continue
        for source, target in zip(_folders(record), _folders(records[name]), strict=False):
            for file in sorted((change.folder / source).iterdir()):
                added.add(f"{target}/{file.name}")
                yield CommitOperationAdd(f"{target}/{file.name}", file)
    kept = {folder for record in records.values() for folder in _folders(record)}
    gone = {folder for record in head.records.values() for folder in _folders(record)} - kept
    stale = {path for folder in gone for path in head.inside(folder)}
    shards = set(head.manifest["shards"] if head.manifest else ()) - manifest["shards"].keys()
    for path in sorted((stale | shards) - added):
        yield CommitOperationDelete(path)


@dataclass(frozen=True)
class _Dress:
    """What a commit holds beside concepts: the manifest, its card, pictures and signature."""

    repository: str
    license: str | None
    pictures: tuple[Picture, ...]
    signing_key: str | Path | None

    def files(
        self, head: _Head, manifest: Mapping[str, Any], folder: Path
    ) -> Iterator[CommitOperationAdd | CommitOperationDelete]:
        folder.mkdir()
        changed = manifest is not head.manifest
        data = seal(manifest, folder / MANIFEST) if changed else head.data
        (folder / MANIFEST).write_bytes(data)
        card = model_card(manifest, self.repository, self.license, self.pictures, head.card)
        (folder / CARD).write_text(card, "utf-8")
        for picture in self.pictures:
            (folder / picture.path).parent.mkdir(exist_ok=True)
            (folder / picture.path).write_bytes(picture.png())
        if self.signing_key is not None:
            sign(folder, self.signing_key)
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            yield CommitOperationAdd(file.relative_to(folder).as_posix(), file)
        if SIGNATURE in head.files and changed and self.signing_key is None:
            yield CommitOperationDelete(SIGNATURE)
