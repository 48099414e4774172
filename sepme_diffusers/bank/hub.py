"""A bank on the Hugging Face Hub: pulled in part, pushed in part, and never over what others pushed meanwhile."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
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
from sepme_diffusers.bank.contents import Contents, Layout, draft, read
from sepme_diffusers.bank.entry import Origin
from sepme_diffusers.bank.errors import BankError, PolicyError
from sepme_diffusers.bank.folder import BankFolder, hashes, sha256, top_names
from sepme_diffusers.bank.layout import ASSETS, CARD, MANIFEST, SIGNATURE
from sepme_diffusers.bank.manifest import parse, records_in, seal
from sepme_diffusers.bank.records import TABLES, Tables, base_from_dict, base_to_dict
from sepme_diffusers.bank.signing import sign
from sepme_diffusers.text.names import listed, some

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
            raise KeyError(f"cannot push {unknown}: the bank has {some(self.entries)}")
        removed = tuple(listed(remove))
        how = Layout(dtype, pack, *choose(self.base, self.entries, self.denoiser, adapters, base))
        api = HfApi(
            endpoint=endpoint, token=token, library_name="sepme_diffusers", library_version=version("sepme_diffusers")
        )
        repository = _prepare(api, repo_id, private, None if create_pr else revision)
        change = _Change.of(self, self.origin, repository, named, removed, how, adapters)
        dress = _Dress(repository, license, tuple(pictures), signing_key)
        expected = None
        with TemporaryDirectory(prefix="sepme-push-") as scratch:
            for attempt in range(_ATTEMPTS):
                head = _Head.of(api, repository, revision, Path(scratch) / "cache")
                expected = change.expected(head) if expected is None else expected
                upload = _Upload(head, Path(scratch) / f"attempt-{attempt}")
                drafted = change.draft(head, upload)
                manifest = _merged(head, change, drafted, expected)
                dress.put(head, manifest, upload.folder)
                try:
                    info = api.create_commit(
                        repository,
                        _operations(head, manifest, upload.folder),
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
                    object.__setattr__(self, "origin", change.origin_after(manifest, drafted))
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
    def shards(self) -> dict[str, Any]:
        return self.manifest["shards"] if self.manifest else {}

    @property
    def always(self) -> list[str]:
        return self.manifest["policy"]["always"] if self.manifest else []


class _Upload:
    """Where a push puts what it draws up: a folder here, of which everything goes to the Hub.

    Args:
        head: What the Hub has. What is there already stays there.
        folder: A new one.
    """

    def __init__(self, head: _Head, folder: Path) -> None:
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
        folder = next(iter([*_folders(former or {}), *free]))
        self._taken.add(folder)
        (self.folder / folder).mkdir(exist_ok=True)
        for file, data in files.items():
            (self.folder / folder / file).write_bytes(data)
        return folder


def _folders(record: Mapping[str, Any]) -> list[str]:
    """The folders of a record: a per-module increment's, an adapter's; a record has one at most."""
    return [part["folder"] for part in (record, record.get("adapter", {})) if "folder" in part]


@dataclass(frozen=True)
class _Change:
    """What a push wants to be different on the Hub: concepts that are new or another, and removals.

    Args:
        bank: The bank.
        origin: The repository as the bank's holder last saw it; None for a bank that does not come from there.
        named: See `push_to_hub`, as `remove`.
        remove: See there.
        how: How increments are laid out.
        adapters: See `push_to_hub`.
        changed: The concepts that are not what they were when they were pulled; or those that are named.
    """

    bank: Contents
    origin: Origin | None
    named: tuple[str, ...] | None
    remove: tuple[str, ...]
    how: Layout
    adapters: bool | None
    changed: tuple[str, ...]

    @classmethod
    def of(
        cls,
        bank: Contents,
        origin: Origin | None,
        repository: str,
        named: tuple[str, ...] | None,
        remove: tuple[str, ...],
        how: Layout,
        adapters: bool | None,
    ) -> _Change:
        origin = origin if origin and origin.repository == repository else None
        pulled, seen = (origin.outlines, origin.records) if origin else ({}, {})
        bare = {name for name, record in seen.items() if adapters and not _folders(record)}
        outlines = bank.entries.outlines().items()
        changed = tuple(name for name, outline in outlines if name in bare or pulled.get(name) is not outline)
        names = changed if named is None else named
        if both := sorted(set(names) & set(remove)):
            raise ValueError(f"{both} cannot be both pushed and removed")
        return cls(bank, origin, named, remove, how, adapters, names)

    @property
    def message(self) -> str:
        parts = {"Push": self.changed, "Remove": self.remove}
        said = [f"{verb} {_shown(names)}" for verb, names in parts.items() if names]
        return "; ".join(said) or ("Pack the increments" if self.how.pack else "Update the card")

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
            raise KeyError(f"cannot remove {unknown}: the bank on the Hub has {some(head.records)}")
        return {name: seen.get(name) if name in known else None for name in (*self.changed, *self.remove)}

    def draft(self, head: _Head, upload: _Upload) -> dict[str, Any]:
        """Put there what the Hub lacks, and return a manifest of what this change brings, as a reader has it."""
        changed = set(self.changed)
        names = [name for name in self.bank.entries if name in changed or self._is_packed(name, head)]
        manifest = draft(self.bank, upload, self.how, names) | {"policy": {"always": []}}
        file = upload.folder / MANIFEST
        return parse(seal(manifest, file), file)

    def _is_packed(self, name: str, head: _Head) -> bool:
        """Tell whether a concept gets another place, because the Hub has it as it was pulled."""
        if not self.how.pack or self.origin is None or self.named is not None or name in self.remove:
            return False
        return name in head.records and _alike(head.records[name], self.origin.records.get(name))

    def origin_after(self, manifest: Mapping[str, Any], drafted: Mapping[str, Any]) -> Origin | None:
        """Return what the bank knows once this is pushed: its next push is no conflict with this one."""
        if self.origin is None:
            return cast(HubBank, self.bank).origin
        records = {name: record for name, record in self.origin.records.items() if name not in self.remove}
        records |= {name: manifest["concepts"][name] for name in drafted["concepts"]}
        outlines = {name: self.bank.entries.outline(name) for name in drafted["concepts"]}
        always = self.bank.always if self.named is None else self.origin.always
        return replace(self.origin, always=always, records=records, outlines={**self.origin.outlines, **outlines})


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _merged(
    head: _Head, change: _Change, drafted: Mapping[str, Any], expected: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the manifest that the Hub shall have; the present one itself, if nothing is different."""
    _refuse_conflicts(head, change, drafted["concepts"], expected)
    if head.manifest is None:
        merged = dict(drafted)
    else:
        _refuse_other_base(head.manifest["base"], drafted["base"], _has_per_module(drafted["concepts"]))
        kept = {name: record for name, record in head.records.items() if name not in change.remove}
        merged = {**drafted, "base": _base(head.manifest, drafted, change), "concepts": kept | drafted["concepts"]}
        merged |= _tables(merged["concepts"], head.manifest, drafted)
    merged["concepts"] = _without_refused_adapters(merged["concepts"], change)
    always = [name for name in dict.fromkeys((*head.always, *change.bank.always)) if name not in change.relaxed]
    if missing := [name for name in always if name not in merged["concepts"]]:
        raise PolicyError(f"the bank's policy always erases {missing}; the bank on the Hub would lack them")
    merged["policy"] = {"always": always}
    if head.manifest and all(head.manifest[key] == merged[key] for key in ("base", "policy", "concepts")):
        return head.manifest
    return merged


def _without_refused_adapters(records: Mapping[str, Any], change: _Change) -> dict[str, Any]:
    refused = {name for name, r in records.items() if "adapter" in r and change.refuses_adapter(name, len(records))}
    bare = {name: {key: value for key, value in records[name].items() if key != "adapter"} for name in refused}
    return {name: bare.get(name, record) for name, record in records.items()}


def _tables(records: Mapping[str, Any], head: Mapping[str, Any], drafted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shards and tables that records refer to, of the bank on the Hub and of the change."""
    tables, shards = Tables(), {}
    theirs, mine = Tables.of(head), Tables.of(drafted)
    for name, record in records.items():
        is_mine = name in drafted["concepts"]
        tables.adopt(record, mine if is_mine else theirs)
        if "shard" in record:
            shards[record["shard"]] = (drafted if is_mine else head)["shards"][record["shard"]]
    return {"shards": dict(sorted(shards.items())), **{table: getattr(tables, table) for table in TABLES}}


def _refuse_conflicts(head: _Head, change: _Change, mine: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    conflicts = [
        name
        for name, record in expected.items()
        if not _alike(head.records.get(name), record) and not _alike(head.records.get(name), mine.get(name))
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
    """Check that what is pushed fits the bank on the Hub: text-side increments need the same text encoders alone."""
    there, here = base_from_dict(theirs).fingerprint, base_from_dict(mine).fingerprint
    if reason := there.differs(here) if per_module else there.text_side.differs(here):
        raise BankError(
            f"the bank on the Hub is for {theirs['name']!r} and this one for {mine['name']!r}, another base "
            f"({reason}); push it to a repository of its own"
        )


def _base(head: Mapping[str, Any], drafted: Mapping[str, Any], change: _Change) -> dict[str, Any]:
    """Name the base for the bank on the Hub: as the push does, or as it is there if only some are pushed.

    What one of the two does not know, the other may. Per-module increments on the Hub keep the base that they are of.
    """
    mine, theirs = base_from_dict(drafted["base"]), base_from_dict(head["base"])
    keep = change.named is not None or _has_per_module(head["concepts"])
    return base_to_dict(theirs.completed_by(mine) if keep else mine.completed_by(theirs))


def _has_per_module(records: Mapping[str, Any]) -> bool:
    return any(record["form"] == "module" for record in records.values())


# Where a record says that its files are, and what is derived from the increment for other tools.
_ASIDE = ("shard", "rows", "folder", "adapter")


def _alike(record: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Tell whether two records say the same of an erasure, wherever its files are."""
    if record is None or other is None:
        return record is other
    first, second = ({k: v for k, v in each.items() if k not in _ASIDE} for each in (record, other))
    return first == second


def _operations(
    head: _Head, manifest: Mapping[str, Any], folder: Path
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """List what a commit adds of what is in the folder, and what it deletes: what nothing refers to any more."""
    paths = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    # Adapters were drawn up before it was known how large the bank on the Hub will be.
    wanted = {MANIFEST, SIGNATURE, CARD, ASSETS} | top_names(manifest)
    added = {path: file for path, file in paths.items() if path.split("/")[0] in wanted}
    gone: set[str] = set()
    if head.manifest is not None and manifest is not head.manifest:
        gone = hashes(head.manifest, adapters=True).keys() - hashes(manifest, adapters=True).keys()
        tops = top_names(head.manifest) - top_names(manifest)
        gone |= {file for file in head.files if file.split("/")[0] in tops}
        gone.add(SIGNATURE)  # it is not true any more
    return [
        *(CommitOperationAdd(path, file) for path, file in added.items()),
        *(CommitOperationDelete(path) for path in sorted((gone & head.files) - added.keys())),
    ]


@dataclass(frozen=True)
class _Dress:
    """What a commit holds beside concepts: the manifest, its card, pictures and signature."""

    repository: str
    license: str | None
    pictures: tuple[Picture, ...]
    signing_key: str | Path | None

    def put(self, head: _Head, manifest: Mapping[str, Any], folder: Path) -> None:
        data = head.data if manifest is head.manifest else seal(manifest, folder / MANIFEST)
        (folder / MANIFEST).write_bytes(data)
        card = model_card(manifest, self.repository, self.license, self.pictures, head.card)
        (folder / CARD).write_text(card, "utf-8")
        for picture in self.pictures:
            (folder / picture.path).parent.mkdir(exist_ok=True)
            (folder / picture.path).write_bytes(picture.png())
        if self.signing_key is not None:
            sign(folder, self.signing_key)
