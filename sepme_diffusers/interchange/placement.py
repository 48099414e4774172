"""Where an export goes: it appears complete or not at all, and replaces nothing but an earlier export."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.disk.drafting import libraries

NOTE = "sepme_export"
_NOTE_FILE = f"{NOTE}.json"
_IN_ONE_FILE = ("kohya", "single_file")


def note(bank: ConceptBank, format: str, strengths: Mapping[str, float]) -> dict[str, str]:
    """Describe an export as safetensors metadata. A file or folder that holds it may be replaced by another export.

    Args:
        bank: Where the increments come from.
        format: The format that is written.
        strengths: The erased set, {name: strength}.
    """
    content = {"format": format, "base": bank.base.name, "erased": dict(strengths), "libraries": libraries()}
    return {"format": "pt", NOTE: json.dumps(content, ensure_ascii=False)}


def checked_path(path: str | Path, format: str, formats: tuple[str, ...]) -> Path:
    """Return the path, if an export of this format may be written there.

    Args:
        path: A folder, or a file ending in .safetensors.
        format: What is asked for.
        formats: What there is.

    Raises:
        ValueError: On an unknown format, a path that does not suit it, or the current folder or one above it.
        FileExistsError: If something that no export wrote is there.
    """
    path = Path(path)
    if format not in formats:
        raise ValueError(f"no format {format!r}; choose one of {list(formats)}")
    if path.name in ("", "..") or Path.cwd().is_relative_to(path.resolve()):
        raise ValueError(
            f"{str(path)!r} is the current folder or a folder above it, and an export replaces the folder that it "
            "writes; give the name of a new one"
        )
    if (format in _IN_ONE_FILE) != (path.suffix == ".safetensors"):
        wanted = "one file, whose name ends in .safetensors" if format in _IN_ONE_FILE else "a folder"
        raise ValueError(f"format {format!r} is written as {wanted}, not as {path.name!r}")
    _refuse_content_of_others(path, format)
    return path


@contextmanager
def placed(path: Path, format: str, note: Mapping[str, str]) -> Iterator[Path]:
    """Give a place to write an export to; it takes the path's name when the block ends well, and else is removed.

    Args:
        path: See `checked_path`.
        format: A folder is made, and gets the note, unless the format is a single file.
        note: See `note`.

    Raises:
        FileExistsError: If something that no export wrote has come to be at the path meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    place = staging / path.name
    try:
        if format not in _IN_ONE_FILE:
            place.mkdir()
        yield place
        if place.is_dir():
            _write_note(place, note)
        _set_usual_permissions(place, staging / "probe")
        _refuse_content_of_others(path, format)
        _take_the_place_of(path, place, staging / "former")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_note(folder: Path, note: Mapping[str, str]) -> None:
    content = {**json.loads(note[NOTE]), "files": sorted(_files(folder))}
    (folder / _NOTE_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")


def _set_usual_permissions(place: Path, probe: Path) -> None:
    """Let others read the files, as far as the umask allows: safetensors writes them for their owner alone."""
    probe.touch()
    mode = probe.stat().st_mode
    for file in [place] if place.is_file() else filter(Path.is_file, place.rglob("*")):
        file.chmod(mode)


def _take_the_place_of(path: Path, place: Path, former: Path) -> None:
    if not path.is_dir():
        os.replace(place, path)
        return
    os.replace(path, former)
    try:
        os.replace(place, path)
    except BaseException:
        os.replace(former, path)
        raise


def _refuse_content_of_others(path: Path, format: str) -> None:
    if os.path.lexists(path) and not _replaceable(path, format):
        raise FileExistsError(f"{path} is there and is not, or not only, what an export wrote; choose another name")


def _replaceable(path: Path, format: str) -> bool:
    if path.is_symlink():
        return False
    if format not in _IN_ONE_FILE:
        return path.is_dir() and not _content_of_others(path)
    # Only a regular file is opened: reading a FIFO would wait for whoever writes into it.
    return path.is_file() and _holds_note(path)


def _holds_note(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return NOTE in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _content_of_others(folder: Path) -> set[Path]:
    """List what is in a folder beside the files that its note lists and the folders that these are in."""
    written = {folder / name for name in _listed_files(folder)}
    needed = {parent for file in written for parent in file.parents}
    return {
        path
        for path in folder.rglob("*")
        if path.is_symlink() or not (path in written if path.is_file() else path in needed and path.is_dir())
    }


def _listed_files(folder: Path) -> set[str]:
    """Name the files that the note in a folder lists, and the note itself; none if there is no note."""
    try:
        return {_NOTE_FILE, *json.loads((folder / _NOTE_FILE).read_text("utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
