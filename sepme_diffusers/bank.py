"""ConceptBank: erasures by name, with what each was made from; on disk and back."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sepme_diffusers.card import ASSETS, CARD, Picture, model_card, write_pictures
from sepme_diffusers.concepts import Concept
from sepme_diffusers.config import SepMEConfig
from sepme_diffusers.increment import Increment

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

MANIFEST = "sepme_bank.json"
FORMAT_VERSION = 1
LORA_FILE, LORA_CONFIG, TEXT_FILE = "adapter_model.safetensors", "adapter_config.json", "text_increment.safetensors"


class BankError(ValueError):
    """A bank on disk cannot be trusted or understood; the message names the file."""


@dataclass(frozen=True)
class Entry:
    """One erasure of a bank.

    Args:
        concept: What it erases.
        increment: How.
        config: The settings it was made with.
        guards: The prompts that it leaves as they were, exactly.
        metrics: Anything measured about it (steps, loss, seconds, leakage ...), plain JSON values.
    """

    concept: Concept
    increment: Increment
    config: SepMEConfig
    guards: tuple[str, ...]
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseModel:
    """What a bank was made on.

    Args:
        name: Id or folder of the base model.
        width: d of the text embedding.
        n_tokens: Tokens of a prompt.
        projections: {module name: (d_out, Frobenius norm of W_m)}, which tells one base's weights from another's.
    """

    name: str
    width: int
    n_tokens: int
    projections: Mapping[str, tuple[int, float]]


@dataclass(frozen=True)
class Guarantee:
    """What a bank promises for a guarded prompt.

    Args:
        exact: Its picture stays as it was, up to rounding, whatever is erased.
        leakage: If not exact: the largest share ‖e ΔWᵀ‖ / ‖e Wᵀ‖ by which one increment moves it, measured when the
            increment was made.
        unaware: Concepts of the bank whose increments do not guard the prompt (made before it was known, say):
            nothing is promised while one of these is erased.
    """

    exact: bool
    leakage: float
    unaware: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """What the holder of a bank knows of the Hub repository that it came from, to notice what others push meanwhile.

    Args:
        repository: Its id.
        always: The policy as it was pulled.
        entries: The entries as they were pulled. One that is another object now was changed since.
        records: {concept name: its record in the manifest on the Hub}, as last seen.
    """

    repository: str
    always: tuple[str, ...]
    entries: dict[str, Entry]
    records: dict[str, Any]


@dataclass(frozen=True)
class ConceptBank(Mapping[str, Entry]):
    """Erasures by concept name, in the order in which they are always added up. Immutable.

    Args:
        base: What the increments were made on.
        entries: {concept name: entry}.
        always: Names that may never be restored while the bank is loaded.
        origin: Where it was pulled from; set by `from_pretrained`, used by `push_to_hub`.

    Raises:
        ValueError: If an entry's key is not its concept's name, widths differ, or `always` names none of them.

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
        widths = {key: e.increment.A.shape[1] for key, e in self.entries.items()}
        if wrong := {key: width for key, width in widths.items() if width != self.base.width}:
            raise ValueError(
                f"the bank is for embeddings of width {self.base.width}; these increments differ: {wrong}"
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
            KeyError: If one is not in the bank.
            ValueError: If it would leave out a concept that the policy always erases.
        """
        wanted = {name: self[name] for name in names}
        if left_out := sorted(set(self.always) - set(wanted)):
            raise ValueError(f"the bank's policy always erases {left_out}; keep them in the subset")
        return replace(self, entries={name: self.entries[name] for name in self.entries if name in wanted})

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        license: str | None = None,
        pictures: Iterable[Picture] = (),
    ) -> None:
        """Write the bank into a folder: wholly, or not at all.

        Concept files are written first, under names that nothing yet refers to; replacing the manifest is the one
        step that makes them the bank. Files that do not change are left alone.

        Args:
            folder: Made if missing. Concepts there that are not in this bank are removed.
            dtype: Of B or C; None leaves each as it is. A stays in float32: it carries the separability.
            license: Of the bank, for its card. Default: what the card there says.
            pictures: Shown by the card, beside those it has, see `card_pictures`.

        Raises:
            BankError: If the folder holds something else than a bank.
        """
        _BankFolder(Path(folder)).write(self, dtype, license, tuple(pictures))

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
        from sepme_diffusers.hub import push

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
        if isinstance(concepts, str):
            raise TypeError(f"give a list of concepts: [{concepts!r}], not {concepts!r}")
        if hub.pop("proxies", None):
            raise ValueError(
                f"huggingface_hub {version('huggingface_hub')} takes no proxies=; set HTTPS_PROXY, or a client with "
                "huggingface_hub.set_client_factory"
            )
        wanted = None if concepts is None else list(concepts)
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            return cls._from_folder(folder / subfolder, wanted, require_signature)
        from sepme_diffusers.hub import pull

        signed = require_signature is not None
        return pull(
            str(pretrained_model_name_or_path), wanted, subfolder, signed, hub,
            lambda folder: cls._from_folder(folder, wanted, require_signature),
        )  # fmt: skip

    @classmethod
    def _from_folder(cls, folder: Path, wanted: list[str] | None, public_key: str | Path | None) -> ConceptBank:
        if public_key is not None:
            from sepme_diffusers.signing import verify_signature

            verify_signature(folder, public_key)
        return _BankFolder(folder).read(wanted)

    @property
    def guarantees(self) -> dict[str, Guarantee]:
        """What the bank promises for each prompt that one of its increments guards, whatever is erased."""
        prompts = dict.fromkeys(prompt for entry in self.values() for prompt in entry.guards)
        return {prompt: self._guarantee(prompt) for prompt in prompts}

    def _guarantee(self, prompt: str) -> Guarantee:
        leaks = [entry.metrics.get("leakage_of", {}).get(prompt, 0.0) for entry in self.values()]
        unaware = tuple(name for name, entry in self.items() if prompt not in entry.guards and name != prompt)
        return Guarantee(not any(leaks) and not unaware, max(leaks), unaware)


class _BankFolder:
    """A bank's folder; the manifest alone says what belongs to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, wanted: Sequence[str] | None = None) -> ConceptBank:
        """The bank, or the part of it with the wanted concepts."""
        manifest = self.manifest(wanted)
        try:
            base = BaseModel(**manifest["base"])
            base = replace(base, projections={name: tuple(value) for name, value in base.projections.items()})
            entries = {name: self._entry(name, record) for name, record in manifest["concepts"].items()}
            return ConceptBank(base, entries, tuple(manifest["policy"]["always"]))
        except BankError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BankError(f"{self.folder / MANIFEST} is not a valid bank manifest: {error!r}") from error

    def manifest(self, wanted: Sequence[str] | None = None) -> dict[str, Any]:
        """The manifest, with no concepts but the wanted ones."""
        manifest = self._manifest()
        if wanted is None:
            return manifest
        concepts, always = manifest.get("concepts", {}), manifest.get("policy", {}).get("always", ())
        if unknown := [name for name in wanted if name not in concepts]:
            raise KeyError(f"no concepts {unknown} in this bank; it has {list(concepts)}")
        if left_out := sorted(set(always) - set(wanted)):
            raise ValueError(f"the bank's policy always erases {left_out}; load them as well")
        return {**manifest, "concepts": {name: record for name, record in concepts.items() if name in wanted}}

    def _manifest(self) -> dict[str, Any]:
        file = self.folder / MANIFEST
        if not file.is_file():
            raise BankError(f"{self.folder} is no concept bank: it has no {MANIFEST}")
        try:
            manifest = json.loads(file.read_text("utf-8"), object_pairs_hook=_no_twins)
        except (ValueError, RecursionError) as error:
            raise BankError(f"{file} is not JSON: {error}") from error
        if not isinstance(manifest, dict) or manifest.get("format") != "sepme_bank":
            raise BankError(f"{file} is not the manifest of a concept bank")
        if manifest.get("version") != FORMAT_VERSION:
            raise BankError(
                f"{file} is of format version {manifest.get('version')!r}; this release reads {FORMAT_VERSION}. "
                "Upgrade sepme_diffusers to read newer banks"
            )
        return manifest

    def _entry(self, name: str, record: Mapping[str, Any]) -> Entry:
        file = self._inside(record["file"])
        if not file.is_file():
            raise BankError(f"concept {name!r}: {file} is missing")
        data = file.read_bytes()
        if _sha256(data) != record["sha256"]:
            raise BankError(f"concept {name!r}: {file} is damaged or was changed (its SHA-256 is not the manifest's)")
        try:
            tensors = load_tensors(data)
            increment = Increment(**tensors) if record["form"] == "text" else Increment.from_lora(tensors)
        except (SafetensorError, TypeError, ValueError) as error:
            raise BankError(f"concept {name!r}: {file} holds no increment: {error}") from error
        config = SepMEConfig.from_dict(record["config"])
        concept = Concept.from_dict({"name": name, **record["concept"]})
        return Entry(concept, increment, config, tuple(record["guards"]), record["metrics"])

    def _inside(self, path: str) -> Path:
        """A manifest's path as a file of this folder, refusing any that leads elsewhere."""
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or len(pure.parts) != 2 or "\\" in path:
            raise BankError(f"{self.folder / MANIFEST} names {path!r}, which is not a file of a concept's folder")
        return self.folder / pure

    def write(
        self, bank: ConceptBank, dtype: torch.dtype | None, license: str | None, pictures: tuple[Picture, ...]
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        old = self._manifest() if (self.folder / MANIFEST).exists() else None
        if old is None and any(self.folder.iterdir()):
            raise BankError(f"{self.folder} is not empty and holds no concept bank; choose another folder")
        concepts: dict[str, Any] = {}
        for name, entry in bank.items():
            concepts[name] = self._write_entry(
                entry, dtype, {ASSETS, *(record["file"].split("/")[0] for record in concepts.values())}
            )
        manifest = {
            "format": "sepme_bank",
            "version": FORMAT_VERSION,
            "libraries": libraries(),
            "base": vars(bank.base),
            "policy": {"always": list(bank.always)},
            "concepts": concepts,
        }
        card = self.folder / CARD
        previous = card.read_text("utf-8") if card.is_file() else None
        write_pictures(self.folder, pictures)
        _replace(card, model_card(manifest, None, license, pictures, previous).encode())
        _replace(self.folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode())
        if old is not None:
            self._sweep(old, concepts)

    def _write_entry(self, entry: Entry, dtype: torch.dtype | None, taken: set[str]) -> dict[str, Any]:
        files = _files(entry, dtype)
        weights, data = next(iter(files.items()))
        digest = _sha256(data)
        target = self._target(entry.concept, weights, digest, taken)
        if not (self.folder / target / weights).exists():
            staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.folder))
            staging.chmod(0o755)
            for file, content in files.items():
                (staging / file).write_bytes(content)
            os.replace(staging, self.folder / target)
        return {
            "file": f"{target}/{weights}",
            "sha256": digest,
            "form": entry.increment.form,
            "rank": entry.increment.rank,
            "concept": {key: value for key, value in entry.concept.to_dict().items() if key != "name"},
            "guards": list(entry.guards),
            "config": entry.config.to_dict(),
            "metrics": dict(entry.metrics),
        }

    def _target(self, concept: Concept, weights: str, digest: str, taken: set[str]) -> str:
        """The concept's folder name: its slug, or with a hash where that name holds something else."""
        other = _sha256(f"{concept.name}\0{digest}".encode())[:12]
        for name in (concept.slug, f"{concept.slug}-{other}"):
            file = self.folder / name / weights
            same = file.is_file() and _sha256(file.read_bytes()) == digest
            if name not in taken and (same or not (self.folder / name).exists()):
                return name
        raise BankError(f"{self.folder / concept.slug} holds other files than the bank's; remove them and save again")

    def _sweep(self, old: Mapping[str, Any], concepts: Mapping[str, Any]) -> None:
        """Remove what the former manifest named and this one does not, and what an interrupted save left."""
        kept = {record["file"].split("/")[0] for record in concepts.values()}
        former = {self._inside(record["file"]).parent for record in old["concepts"].values()}
        for folder in (*former, *self.folder.glob(".writing-*")):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def _files(entry: Entry, dtype: torch.dtype | None) -> dict[str, bytes]:
    """The files of a concept's folder, the weights first."""
    increment = entry.increment
    if increment.form == "text":
        tensors = {"A": increment.A.float(), "B": increment.B.to(dtype or increment.B.dtype)}
        return {TEXT_FILE: save_tensors(_contiguous(tensors), {"format": "pt"})}
    tensors, config = increment.lora()
    dtypes = {key: torch.float32 if ".lora_A." in key else dtype or tensor.dtype for key, tensor in tensors.items()}
    tensors = {key: tensor.to(dtypes[key]) for key, tensor in tensors.items()}
    settings = {key: value for key, value in config.to_dict().items() if value is not None}
    settings["target_modules"] = sorted(settings["target_modules"])
    plain = json.dumps(settings, indent=2, sort_keys=True, default=str).encode()
    return {LORA_FILE: save_tensors(_contiguous(tensors), {"format": "pt"}), LORA_CONFIG: plain}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def libraries() -> dict[str, str]:
    """Versions of what made a bank."""
    names = ("sepme_diffusers", "torch", "diffusers", "transformers", "peft", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _replace(file: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_name(f".writing-{file.name}")
    with open(temporary, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a key stands twice among {[key for key, _ in pairs]}")
    return values
