"""The kinds that there are: those of the package, and those that a model's folder brings."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sepme_diffusers.making.kinds.kind import Kind, read_kind

FOLDER = "kinds"
"""Where in its folder a model keeps kinds of its own."""


def kind_names() -> tuple[str, ...]:
    """Return the names of the kinds that the package brings."""
    files = resources.files("sepme_diffusers.making.kinds").iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def find_kind(kind: Kind | str | Path, pipe: Any = None) -> Kind:
    """Return a kind: by its name, as the model's folder or the package has it, or from a file.

    Args:
        kind: A name, a path of a JSON file, or the kind itself.
        pipe: The pipeline whose folder may have a kind of this name in it, in `kinds/`.

    Raises:
        ValueError: If there is no such kind.
    """
    if isinstance(kind, Kind):
        return kind
    if isinstance(kind, Path) or str(kind).endswith(".json"):
        return Kind.from_file(kind)
    own = model_folder(pipe) / FOLDER / f"{kind}.json"
    if kind.isidentifier() and own.is_file():
        return Kind.from_file(own)
    if kind not in kind_names():
        raise ValueError(
            f"no kind {kind!r}; there are {list(kind_names())}, or give the path of a JSON file like theirs"
        )
    return _of_package(kind)


def has_kind(kind: str | None, pipe: Any) -> bool:
    """Tell whether the model's folder or the package has a kind of this name."""
    return kind is not None and (kind in kind_names() or (model_folder(pipe) / FOLDER / f"{kind}.json").is_file())


def model_folder(pipe: Any) -> Path:
    """Return the folder that a pipeline was loaded from; a folder that does not exist for one from elsewhere."""
    config = getattr(pipe, "config", None)
    return Path(str(config.get("_name_or_path") or "none")) if config is not None else Path("none")


@cache
def _of_package(kind: str) -> Kind:
    file = resources.files("sepme_diffusers.making.kinds") / f"{kind}.json"
    return read_kind(file.read_bytes(), file.name)
