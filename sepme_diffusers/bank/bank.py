"""ConceptBank: erasures by name, with what each was made from; on disk and back."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sepme_diffusers.bank.card import CARD, Picture, model_card, write_pictures
from sepme_diffusers.bank.entry import BaseModel, Entry, Guarantee, Origin, base_model, entry_of
from sepme_diffusers.bank.folder import BankFolder, ConceptFiles, increment_files
from sepme_diffusers.bank.manifest import MANIFEST, BankError
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.names import listed
from sepme_diffusers.text.spelling import look_alikes

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


@dataclass(frozen=True)
class ConceptBank(Mapping[str, Entry]):
    """Erasures by concept name, in the order in which they are always added up. Immutable.

    Args:
        base: What the increments were made on.
        entries: {concept name: entry}.
        always: Names that may never be restored while the bank is loaded.
        origin: Where it was pulled from; set by `from_pretrained`, used by `push_to_hub`.

    Raises:
        ValueError: If an entry's key is not its concept's name, two names look alike, widths or edited modules are
            not the base's, or `always` names none of them.

    Example:
        >>> from sepme_diffusers import pocket
        >>> bank = pocket.bank("styles")
        >>> bank["woodcut"].increment.form
        'text'
    """

    base: BaseModel
    entries: Mapping[str, Entry] = field(default_factory=dict)
    always: tuple[str, ...] = ()
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", dict(self.entries))
        if wrong := {key: e.concept.name for key, e in self.entries.items() if key != e.concept.name}:
            raise ValueError(f"entries under another name than their concept's: {wrong}")
        if alike := look_alikes(self.entries):
            raise ValueError(f"concepts that nobody can tell apart: {alike}; give them other names")
        widths = {key: e.increment.A.shape[1] for key, e in self.entries.items()}
        if wrong := {key: width for key, width in widths.items() if width != self.base.width}:
            raise ValueError(
                f"the bank is for embeddings of width {self.base.width}; these increments differ: {wrong}"
            )
        heights = {module: d_out for module, (d_out, _) in self.base.projections.items()}
        if wrong := [key for key, e in self.entries.items() if not _fits(e.increment, heights)]:
            raise ValueError(f"these increments edit other modules than the base's, or of other heights: {wrong}")
        doors = {key: {n: d.A.shape[1] for n, d in e.increment.doors.items()} for key, e in self.entries.items()}
        if wrong := {key: widths for key, widths in doors.items() if not widths.items() <= self.base.doors.items()}:
            raise ValueError(
                f"the base has the further doors {dict(self.base.doors)}; these increments differ: {wrong}"
            )
        if unknown := sorted(set(self.always) - set(self.entries)):
            raise ValueError(f"the policy always erases {unknown}, which the bank lacks; it has {list(self.entries)}")

    def __deepcopy__(self, memo: dict[int, Any]) -> ConceptBank:
        return self

    def __getitem__(self, name: str) -> Entry:
        if name not in self.entries:
            raise KeyError(f"no concept {name!r} in this bank; it has {list(self.entries)}")
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def with_entries(self, entries: Iterable[Entry]) -> ConceptBank:
        """This bank with more entries, or others under the same names; the rest untouched."""
        return replace(self, entries={**self.entries, **{entry.concept.name: entry for entry in entries}})

    def subset(self, names: Iterable[str]) -> ConceptBank:
        """The bank with these concepts alone, in the bank's order.

        Raises:
            TypeError: If a single string is given.
            KeyError: If one is not in the bank.
            ValueError: If it would leave out a concept that the policy always erases.
        """
        wanted = {name: self[name] for name in listed(names)}
        if left_out := sorted(set(self.always) - set(wanted)):
            raise ValueError(f"the bank's policy always erases {left_out}; keep them in the subset")
        return replace(self, entries={name: self.entries[name] for name in self.entries if name in wanted})

    def compact(self) -> ConceptBank:
        """The bank in a quarter to a half of what float32 takes: every number in float16, see `Increment.compact`.

        Per-module increments are no longer PEFT LoRAs on disk, where A would stand once a module: `export_adapters`
        makes these.
        """
        return self.with_entries(replace(entry, increment=entry.increment.compact()) for entry in self.values())

    def obey_policy(self, strengths: Mapping[str, float], name: str = "") -> None:
        """Check an erased set, {concept: strength}, against the policy.

        Args:
            strengths: The set.
            name: What the bank is called, for the message.

        Raises:
            ValueError: If it leaves out what the policy always erases, or weakens it.
        """
        if left_out := [concept for concept in self.always if strengths.get(concept, 0.0) < 1.0]:
            bank = f"bank {name!r}" if name else "the bank"
            raise ValueError(f"the policy of {bank} always erases {left_out} at full strength; include them")

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        license: str | None = None,
        pictures: Iterable[Picture] = (),
    ) -> None:
        """Write the bank into a folder: wholly, or not at all, whenever the process dies.

        Concept files are written first, under names that nothing yet refers to; replacing the manifest is the one
        step that makes them the bank. Files that do not change are left alone.

        Args:
            folder: Made if missing. Concepts there that are not in this bank are removed.
            dtype: Of B or C; None leaves each as it is. A stays in float32: it carries the separability. Compact
                increments stay as they are altogether.
            license: Of the bank, for its card. Default: what the card there says.
            pictures: Shown by the card, beside those it has, see `card_pictures`.

        Raises:
            BankError: If the folder holds something else than a bank that can be read, the bank cannot be written
                down (metrics that are no JSON, say), or another process is saving there.
        """
        head = {
            "libraries": libraries(),
            "base": {key: value for key, value in vars(self.base).items() if key != "doors" or value},
            "policy": {"always": list(self.always)},
        }
        folder, pictures = Path(folder), tuple(pictures)
        previous = (folder / CARD).read_text("utf-8", errors="replace") if (folder / CARD).is_file() else None
        BankFolder(folder).write(
            head,
            (_files(entry, dtype) for entry in self.values()),
            lambda manifest: model_card(manifest, None, license, pictures, previous),
        )
        write_pictures(folder, pictures)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        concepts: Iterable[str] | None = None,
        remove: Iterable[str] = (),
        **options: Any,
    ) -> CommitInfo:
        """Publish the bank on the Hugging Face Hub, in one commit that uploads only what is new there.

        Concepts on the Hub that this bank lacks stay. What others pushed since this bank was pulled stays as well: the
        push is made again on top of theirs, unless both changed the same concept.

        Args:
            repo_id: The repository; made if missing.
            private: Whether a repository that is made is private. True refuses a public one that exists.
            token: As for every function of huggingface_hub. Default: the one that was logged in with.
            revision: The branch; made if missing. Default: "main".
            create_pr: Open a pull request instead of committing to the branch.
            commit_message: Default: it names the concepts.
            concepts: Push these alone. Naming one that the Hub has allows a bank that was not pulled to replace it.
            remove: Concepts to take off the Hub.
            options: `license`, `pictures`, `dtype`, `signing_key`, `endpoint` of `sepme_diffusers.hub.push`.

        Raises:
            PushConflict: If the Hub holds another version of a concept than this bank knows. Nothing is published.
            BankError: If the repository holds something else than a bank, or a bank for another base.
            KeyError: If the bank lacks one of `concepts`, or the Hub one of `remove`.
            ValueError: If it would leave out or remove a concept that a policy always erases, or `private` is not so.
            HfHubHTTPError: What huggingface_hub raises: not found, not allowed, ...
        """
        from sepme_diffusers.bank.hub import push

        return push(
            self, repo_id, private=private, token=token, revision=revision, create_pr=create_pr,
            commit_message=commit_message, concepts=concepts, remove=remove, **options,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        concepts: Iterable[str] | None = None,
        subfolder: str = "",
        require_signature: str | Path | None = None,
        **hub: Any,
    ) -> ConceptBank:
        """The bank in a folder or a Hub repository, every hash checked.

        Args:
            pretrained_model_name_or_path: A folder, or a repository id.
            concepts: Load (and download) these alone. Default: all.
            subfolder: Where in the folder or repository the bank is.
            require_signature: A public key (PEM file): refuse a bank that its owner did not sign, see `signing`.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, ... of `snapshot_download`.

        Raises:
            BankError: If anything is missing, damaged, unsafe, not signed as required or of a newer format, or the
                download broke off; nothing is loaded then.
            HfHubHTTPError: What huggingface_hub raises: not found, not allowed, ...
            KeyError: If the bank lacks one of `concepts`.
            ValueError: If `concepts` leaves out one that the bank's policy always erases.
        """
        if hub.pop("proxies", None):
            raise ValueError(
                f"huggingface_hub {version('huggingface_hub')} takes no proxies=; set HTTPS_PROXY, or a client with "
                "huggingface_hub.set_client_factory"
            )
        wanted = None if concepts is None else listed(concepts)
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            return cls._from_folder(folder / subfolder, wanted, require_signature)
        from sepme_diffusers.bank.hub import pull

        signed = require_signature is not None
        return pull(
            str(pretrained_model_name_or_path), wanted, subfolder, signed, hub,
            lambda folder: cls._from_folder(folder, wanted, require_signature),
        )  # fmt: skip

    @classmethod
    def _from_folder(cls, folder: Path, wanted: list[str] | None, public_key: str | Path | None) -> ConceptBank:
        if public_key is not None:
            from sepme_diffusers.bank.signing import verify_signature

            verify_signature(folder, public_key)
        return _read(BankFolder(folder), wanted)

    @property
    def guarantees(self) -> dict[str, Guarantee]:
        """What the bank promises for each guarded prompt and each concept's name, whatever else is erased."""
        prompts = dict.fromkeys([*(prompt for entry in self.values() for prompt in entry.guards), *self])
        return {prompt: self._guarantee(prompt) for prompt in prompts}

    def _guarantee(self, prompt: str) -> Guarantee:
        leaks = [entry.metrics.get("leakage_of", {}).get(prompt, 0.0) for entry in self.values()]
        unaware = tuple(name for name, entry in self.items() if prompt not in entry.guards and name != prompt)
        return Guarantee(not any(leaks) and not unaware, max(leaks), unaware)


def _read(folder: BankFolder, wanted: Sequence[str] | None) -> ConceptBank:
    """The bank in a folder, or the part of it with the wanted concepts."""
    manifest = folder.manifest(wanted)
    base = base_model(manifest)
    increments = {
        name: folder.increment(name, record, manifest["base"]) for name, record in manifest["concepts"].items()
    }
    try:
        entries = {
            name: entry_of(name, manifest["concepts"][name], increment) for name, increment in increments.items()
        }
        return ConceptBank(base, entries, tuple(manifest["policy"]["always"]))
    except (TypeError, ValueError) as error:
        raise BankError(f"{folder.folder / MANIFEST} is not a valid bank manifest: {error}") from error


def _fits(increment: Increment, heights: Mapping[str, int]) -> bool:
    return increment.C is None or {module: len(c) for module, c in increment.C.items()} == heights


def _files(entry: Entry, dtype: torch.dtype | None) -> ConceptFiles:
    record = {
        "form": entry.increment.form,
        "rank": entry.increment.rank,
        "concept": {key: value for key, value in entry.concept.to_dict().items() if key != "name"},
        "guards": list(entry.guards),
        "config": entry.config.to_dict(),
        "metrics": dict(entry.metrics),
    }
    if entry.increment.gate is not None:
        record["gate"] = entry.increment.gate
    doors = entry.increment.doors.items()
    if gates := {name: increment.gate for name, increment in doors if increment.gate is not None}:
        record["gates"] = gates
    try:
        files = increment_files(entry.increment, dtype)
    except ValueError as error:
        raise BankError(f"concept {entry.concept.name!r} cannot be saved as {dtype}: {error}") from error
    return ConceptFiles(entry.concept.name, entry.concept.slug, files, record)


def libraries() -> dict[str, str]:
    """Versions of what made a bank."""
    names = ("sepme_diffusers", "torch", "diffusers", "transformers", "peft", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
