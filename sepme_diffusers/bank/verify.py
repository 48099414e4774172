"""Whether a bank is what it says: every fault of its files, its increments and its guards, at once."""

from __future__ import annotations

import copy
import os
import random
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sepme_diffusers.bank.adapter_check import AdapterCheck, other_settings
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import has_per_module, refuse_other_weights
from sepme_diffusers.bank.contents import lora_files
from sepme_diffusers.bank.entries import Entries
from sepme_diffusers.bank.entry import BaseModel, Entry, has_exact_guard
from sepme_diffusers.bank.errors import BankError, short
from sepme_diffusers.bank.folder import BankFolder, hashes
from sepme_diffusers.bank.layout import CARD, LOCK, LORA_CONFIG, LORA_FILE, MANIFEST, SIGNATURE
from sepme_diffusers.bank.manifest import examine
from sepme_diffusers.bank.store import Store
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.leakage import leakage
from sepme_diffusers.text.encoding import TOKENS, encode_doors

# The base (None where it cannot be read), entries, faults of the folder, faults by concept, notes, and entries whose
# increments were solved for once more, with what their adapters do.
_Parts = tuple[BaseModel | None, dict[str, Entry], list[str], dict[str, list[str]], list[str], dict[str, Entry]]
# Shipped increments change a weight by up to 4 times its norm, and an embedding by up to 30 times.
_HUGE = 300.0
# What a guarded prompt's projections may move by; and where the text encoder's weights were rounded to half precision,
# which moves a sound bank's by up to 1.4 %.
_EXACT, _ROUNDED = 1e-4, 2e-2
# Guards of banks of more than so many concepts are measured for so many of them, unless it is said for how many.
_MANY, _SAMPLE = 1000, 100
_MAX_CONFIG, _MAX_ADAPTER = 2**20, 4 * 2**30
# Beside a bank there may stand what people and repositories need, and no loader reads.
_HARMLESS = {MANIFEST, SIGNATURE, CARD, LOCK, "LICENSE", "LICENSE.md", "LICENSE.txt", ".gitattributes", ".gitignore"}
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}
_TOOLS = {".git", ".cache"}


@dataclass(frozen=True)
class Checked:
    """What was found of one concept.

    Args:
        form: "text" or "module"; None if it could not be read.
        rank: Of the increment.
        norm: The largest share ‖ΔW‖ / ‖W‖ of a module; in text-side form the largest by which an embedding can be
            stretched.
        leakage: The largest that was measured on a guard; None without a pipeline.
        faults: What is wrong with it.
    """

    form: str | None = None
    rank: int | None = None
    norm: float | None = None
    leakage: float | None = None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Args:
        folder: Faults of the folder, the manifest, or the bank as a whole.
        concepts: {concept: what was found of it}.
        notes: What could not be checked, and why.
    """

    folder: tuple[str, ...]
    concepts: Mapping[str, Checked]
    notes: tuple[str, ...] = ()

    @property
    def faults(self) -> tuple[str, ...]:
        """Every fault, with the concept that has it."""
        by_concept = (f"concept {name!r}: {fault}" for name, c in self.concepts.items() for fault in c.faults)
        return (*self.folder, *by_concept)

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults


def verify(bank: ConceptBank | str | Path, pipe: Any = None, sample: int | None = None) -> Report:
    """Check a bank, and list everything that is wrong with it.

    Checks the manifest against its schema and its digest, every file against its hash, the folder for anything that
    does not belong there, each increment's numbers, shape, rank and norm, and that what it claims is written down.
    With a pipeline also that the bank fits the base, that no guarded prompt moves, by the pipeline's own text
    encoders, and that adapters do what the increments do, if they are of its denoiser.

    Args:
        bank: A bank, or its folder.
        pipe: The base; only read. Guards are measured in float32, with copies of its text encoders. Where their
            weights were rounded to half precision, a guard may move by up to 2 %, and a note says so.
        sample: Measure the guards of so many concepts, chosen at random: those that should be exact, those that the
            bank says are moved, and so many others. Default: all guards of all concepts; 100 in a bank of more than
            1,000.

    Raises:
        ValueError: If the pipeline has no text encoder, or no embedding for a door at which increments act; or if the
            sample is not at least one concept.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, pocket
        >>> verify(pocket.bank("styles"), SepMEPipeline.from_pretrained(pocket.path())).ok
        True
    """
    if sample is not None and sample < 1:
        raise ValueError(f"sample= is a number of concepts, at least 1, not {sample}")
    parts: _Parts
    if isinstance(bank, ConceptBank):
        parts = (bank.base, dict(bank), [], {}, [], {})
    else:
        parts = _read(BankFolder(Path(bank)), pipe)
    base, entries, folder, faults, notes, adapters = parts
    leaks: dict[str, dict[str, float]] = {}
    if pipe is None:
        notes.append("guards and base were not checked: that takes a pipeline")
    elif base is not None:
        fault = _base_fault(pipe, base, entries)
        folder += [fault] if fault else []
        exact = _in_float32(pipe)
        chosen = _chosen(entries, _SAMPLE if sample is None and len(entries) > _MANY else sample)
        leaks = {} if fault else _leaks(exact, entries, chosen)
        if len(chosen) < len(entries) and not fault:
            notes.append(f"the guards of {len(chosen)} concepts were measured, chosen at random (see sample=)")
        again = {name: chosen[name] for name in adapters if name in chosen}
        for name, leak in ({} if fault else _leaks(exact, adapters, again)).items():
            faults[name] += _adapter_leak_faults(adapters[name], leak)
        notes += _precision_notes(pipe, leaks)
    for name, entry in entries.items():
        faults[name] = [*faults.get(name, []), *_entry_faults(entry, cast(BaseModel, base))]
        faults[name] += _guard_faults(entry, leaks[name], _tolerance(pipe)) if name in leaks else []
    checked = {name: _checked(entries.get(name), base, leaks.get(name), tuple(faults[name])) for name in faults}
    return Report(tuple(folder), checked, tuple(notes))


def _checked(
    entry: Entry | None, base: BaseModel | None, leaks: Mapping[str, float] | None, faults: tuple[str, ...]
) -> Checked:
    if entry is None or base is None:
        return Checked(faults=faults)
    increment = entry.increment
    leakage = max(leaks.values()) if leaks else None
    return Checked(increment.form, increment.rank, _norm(increment, base), leakage, faults)


# --- the folder


def _read(folder: BankFolder, pipe: Any) -> _Parts:
    """Read what there is to check, and list the faults that are found on the way."""
    try:
        manifest, faults = examine(folder.manifest_bytes())
    except BankError as error:
        return None, {}, [str(error)], {}, [], {}
    faults = [f"{folder.folder / MANIFEST}: {fault}" for fault in faults]
    if manifest is None or faults:
        # Without a manifest nothing says what belongs here, and the folder may be a whole disk.
        return None, {}, faults, {}, [], {}
    faults += _strays(folder, manifest)
    store, entries = Store(folder, manifest), {}
    by_concept: dict[str, list[str]] = {name: [] for name in manifest["concepts"]}
    unreadable = {shard: _shard_faults(store, shard) for shard in manifest["shards"]}
    faults += [fault for of_shard in unreadable.values() for fault in of_shard]
    check = AdapterCheck(store.base, pipe)
    for name, record in manifest["concepts"].items():
        if unreadable.get(record.get("shard", "")):
            by_concept[name].append(f"its increment is in {record['shard']}, which is damaged")
            continue
        try:
            entries[name] = store.entry(name)
        except BankError as error:
            by_concept[name].append(str(error))
        by_concept[name] += _beside_faults(folder, name, record, entries.get(name), check)
    solved_again = {
        name: replace(entries[name], increment=increment, metrics=_claims(entries[name], manifest["concepts"][name]))
        for name, increment in check.solved_again.items()
    }
    return store.base, entries, faults, by_concept, check.notes, solved_again


def _claims(entry: Entry, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a bank says of an adapter that was solved for once more: how far it moves any guard."""
    return {"leakage": record["adapter"].get("leakage", entry.metrics.get("leakage", 0.0))}


def _shard_faults(store: Store, name: str) -> list[str]:
    try:
        path = store.shard(name).path
    except BankError as error:
        return [str(error)]
    try:
        with safe_open(path, "pt"):
            return []
    except (SafetensorError, OSError) as error:
        return [f"{path} is no safetensors file to other readers: {short(error)}"]


def _strays(folder: BankFolder, manifest: Mapping[str, Any]) -> Iterator[str]:
    """List links, special files, names that some systems take for one, and files that the manifest does not name."""
    named = _HARMLESS | hashes(manifest, adapters=True).keys()
    for where, folders, files in os.walk(folder.folder):
        folders[:] = [name for name in folders if Path(where) != folder.folder or name not in _TOOLS]
        yield from _twins(Path(where), [*folders, *files])
        for path in (Path(where, name) for name in files):
            if fault := _stray(folder, path, named):
                yield fault
        yield from (f"{Path(where, name)} is a symbolic link" for name in folders if Path(where, name).is_symlink())


def _twins(where: Path, names: list[str]) -> Iterator[str]:
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(name.casefold(), []).append(name)
    yield from (f"{where}: some systems take {sorted(same)} for one name" for same in folded.values() if len(same) > 1)


def _stray(folder: BankFolder, path: Path, named: set[str]) -> str | None:
    relative = path.relative_to(folder.folder).as_posix()
    if folder.is_link(path):
        return f"{path} is a symbolic link"
    if not stat.S_ISREG(path.lstat().st_mode):
        return f"{path} is not a plain file"
    if relative in named or path.suffix.lower() in _PICTURES:
        return None
    return f"{path} is not named by the manifest"


def _beside_faults(
    folder: BankFolder, name: str, record: Mapping[str, Any], entry: Entry | None, check: AdapterCheck
) -> Iterator[str]:
    """List what is wrong with the files for other tools, which are never read elsewhere."""
    place = record if "folder" in record else record.get("adapter", {})
    files = {}
    for file, digest in place.get("files", {}).items():
        path = f"{place['folder']}/{file}"
        if file == LORA_FILE and place is record:
            continue  # the increment itself, which has been read
        try:
            folder.hold(path, digest)
            files[file] = folder.file(path, _MAX_CONFIG if file == LORA_CONFIG else _MAX_ADAPTER)
        except BankError as error:
            yield str(error)
    if entry is None or len(files) < len(place.get("files", {})) - (place is record):
        return
    if place is record and (keys := other_settings(files[LORA_CONFIG], lora_files(entry.increment)[LORA_CONFIG])):
        config = folder.folder / place["folder"] / LORA_CONFIG
        yield f"{config} tells other tools something else than the manifest: {keys}"
    if files and place is not record:
        yield from check.faults(name, record, files, entry.increment)


# --- the increments


def _entry_faults(entry: Entry, base: BaseModel) -> Iterator[str]:
    norm = _norm(entry.increment, base)
    if not norm <= _HUGE:
        yield f"its increment is huge: {norm:.3g} times what it changes; {_HUGE:g} is the most that is plausible"
    if "leakage" not in entry.metrics:
        yield "its metrics do not say how far it moves its guards (metrics.leakage)"
    if not len(entry.guards):
        yield "it guards no prompt"
    elif not has_exact_guard(entry):
        yield "it guards no prompt exactly (metrics.leakage_of lists all of them), so no pipeline loads it"


def _norm(increment: Increment, base: BaseModel) -> float:
    return max([_own_norm(increment, base), *(_own_norm(part, base) for part in increment.doors.values())])


def _own_norm(increment: Increment, base: BaseModel) -> float:
    # With A = R Q, Q orthonormal rows, ‖C A‖ is ‖C R‖: an (r, r) factor in place of an (r, d) one.
    r = torch.linalg.qr(increment.A.double().T).R.T
    if increment.B is not None:
        return float(torch.linalg.matrix_norm(increment.B.double() @ r, 2))
    norms = {name: max(norm, 1e-12) for name, (_, norm) in (base.projections or {}).items()}
    return max(float((c.double() @ r).norm()) / norms[name] for name, c in (increment.C or {}).items())


# --- with a pipeline


def _base_fault(pipe: Any, base: BaseModel, entries: Mapping[str, Entry]) -> str | None:
    bank, weights = ConceptBank(base, Entries(entries)), _weights(pipe)
    if not weights:
        return (
            "per-module increments need a pipeline with its denoiser to be checked" if has_per_module(bank) else None
        )
    try:
        refuse_other_weights(bank, weights)
    except ValueError as error:
        return str(error)
    return None


def _weights(pipe: Any) -> dict[str, Tensor]:
    """The text projections of the pipeline's denoiser; none where it has no denoiser."""
    return {} if pipe.unet is None else projection_weights(pipe.unet)


def _chosen(entries: Mapping[str, Entry], sample: int | None) -> dict[str, list[str]]:
    """Choose whose guards are measured, and which; those that are moved with their worst cases."""
    if sample is None:
        return {name: list(entry.guards) for name, entry in entries.items()}
    chosen = {}
    for name in sorted(random.sample(list(entries), min(sample, len(entries)))):
        guards, damped = entries[name].guards, list(entries[name].guards.damped)
        listed = [guard for guard in entries[name].metrics.get("leakage_of", {}) if guard in guards]
        others = random.sample(damped, min(sample, len(damped)))
        chosen[name] = list(dict.fromkeys((*guards.exact, *listed, *others)))
    return chosen


def _leaks(
    pipe: Any, entries: Mapping[str, Entry], chosen: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Measure the leakage of guards of concepts, by the pipeline's text encoders and weights.

    Args:
        pipe: The pipeline.
        entries: By concept.
        chosen: {concept: its guards that are measured}.
    """
    if getattr(pipe, "text_encoder", None) is None:
        raise ValueError("the pipeline has no text encoder, so its guards cannot be recomputed")
    prompts = list(dict.fromkeys(prompt for guards in chosen.values() for prompt in guards))
    if not prompts:
        return {}
    weights, embeddings = _weights(pipe), encode_doors(pipe, prompts)
    if missing := {door for entry in entries.values() for door in entry.increment.doors} - embeddings.keys():
        raise ValueError(f"increments act at the doors {sorted(missing)}, for which the pipeline has no embedding")
    places, leaks = {prompt: place for place, prompt in enumerate(prompts)}, {}
    for name, guards in chosen.items():
        if guards:
            of_guards = {door: rows[[places[guard] for guard in guards]] for door, rows in embeddings.items()}
            measured = leakage(entries[name].increment, of_guards[TOKENS], weights, further=of_guards)
            leaks[name] = dict(zip(guards, measured.tolist(), strict=True))
    return leaks


def _in_float32(pipe: Any) -> Any:
    """Return the pipeline, or where it encodes text in half precision, a light copy that does so in float32."""
    if not _is_half(pipe):
        return pipe
    copied = copy.copy(pipe)
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None) is not None:
            # Past the pipeline's own bookkeeping, which both share.
            vars(copied)[name] = copy.deepcopy(getattr(pipe, name)).float()
    return copied


def _is_half(pipe: Any) -> bool:
    return torch.finfo(pipe.text_encoder.dtype).bits < 32


def _tolerance(pipe: Any) -> float:
    return _ROUNDED if _is_half(pipe) else _EXACT


def _precision_notes(pipe: Any, leaks: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Say what half precision cannot tell, where something moves by more than a float32 encoder would allow."""
    largest = max((leak for of_concept in leaks.values() for leak in of_concept.values()), default=0.0)
    if not leaks or not _is_half(pipe) or largest <= _EXACT:
        return []
    return [
        f"the pipeline's text encoder is in {pipe.text_encoder.dtype}: rounded weights move guards by up to "
        f"{largest:.2g}, so nothing below {_ROUNDED:g} was found a fault; load it in float32 to check to {_EXACT:g}"
    ]


def _adapter_leak_faults(entry: Entry, leaks: Mapping[str, float]) -> Iterator[str]:
    prompt, leak = max(leaks.items(), key=lambda pair: pair[1])
    # Of half precision, it moves a guard by up to some thousandths where the increment leaves it alone.
    if not leak <= max(_ROUNDED, 2 * entry.metrics["leakage"]):
        yield f"its adapter moves the guarded prompt {prompt!r} by {leak:.2g} of its projections"


def _guard_faults(entry: Entry, leaks: Mapping[str, float], tolerance: float) -> Iterator[str]:
    claimed = dict.fromkeys(entry.guards.damped, entry.metrics.get("leakage_rest", 0.0))
    claimed |= entry.metrics.get("leakage_of", {})
    what = "embedding" if entry.form == "text" else "projections"
    for prompt, leak in leaks.items():
        # A leak that the bank states in its metrics is no fault; twice as much is.
        if not leak <= max(tolerance, 2 * claimed.get(prompt, 0.0)):
            yield f"it moves the guarded prompt {prompt!r} by {leak:.2g} of its {what}"
