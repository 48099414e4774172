"""Push a bank to the Hugging Face Hub, in one commit and never over what others pushed meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
)
from huggingface_hub.errors import HfHubHTTPError

from sepme_diffusers.bank.adapters import KnownDenoiser, choose
from sepme_diffusers.bank.card import Picture, model_card
from sepme_diffusers.bank.contents import Contents
from sepme_diffusers.bank.disk.drafting import Layout
from sepme_diffusers.bank.disk.folder import hashes, top_names
from sepme_diffusers.bank.disk.layout import ASSETS, CARD, MANIFEST, SIGNATURE
from sepme_diffusers.bank.disk.manifest import seal
from sepme_diffusers.bank.disk.signing import sign
from sepme_diffusers.bank.entry import Origin
from sepme_diffusers.bank.errors import PushConflict
from sepme_diffusers.bank.hub.branch import Head, Upload, prepare
from sepme_diffusers.bank.hub.change import Change, merged
from sepme_diffusers.text.names import listed, some

# As often as others push in between before this gives up.
_ATTEMPTS = 5
_MOVED_ON = 412


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
        repository = prepare(api, repo_id, private, None if create_pr else revision)
        change = Change.of(self, self.origin, repository, named, removed, how, adapters)
        dress = _Dress(repository, license, tuple(pictures), signing_key)
        expected = None
        with TemporaryDirectory(prefix="sepme-push-") as scratch:
            for attempt in range(_ATTEMPTS):
                head = Head.of(api, repository, revision, Path(scratch) / "cache")
                expected = change.expected(head) if expected is None else expected
                upload = Upload(head, Path(scratch) / f"attempt-{attempt}")
                drafted = change.draft(head, upload)
                manifest = merged(head, change, drafted, expected)
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
                if not create_pr and (origin := change.origin_after(manifest, drafted)) is not None:
                    object.__setattr__(self, "origin", origin)
                return info
        raise PushConflict(
            f"others pushed to {repository!r} {_ATTEMPTS} times in a row meanwhile; nothing was published"
        )


def _operations(
    head: Head, manifest: Mapping[str, Any], folder: Path
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

    def put(self, head: Head, manifest: Mapping[str, Any], folder: Path) -> None:
        data = head.data if manifest is head.manifest else seal(manifest, folder / MANIFEST)
        (folder / MANIFEST).write_bytes(data)
        card = model_card(manifest, self.repository, self.license, self.pictures, head.card)
        (folder / CARD).write_text(card, "utf-8")
        for picture in self.pictures:
            (folder / picture.path).parent.mkdir(exist_ok=True)
            (folder / picture.path).write_bytes(picture.png())
        if self.signing_key is not None:
            sign(folder, self.signing_key)
