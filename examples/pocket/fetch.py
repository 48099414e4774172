"""Fetch the emoji art from npm into WORK/art, refusing anything whose licence is not permissive.

python examples/pocket/fetch.py
"""

from __future__ import annotations

import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import typer
from rich.progress import track

# Icon set -> pinned version and the licence that was read when the recipe was written.
PACKAGES = {
    "noto": ("1.2.9", "Apache-2.0"),
    "twemoji": ("1.2.5", "CC-BY-4.0"),
    "fluent-emoji-high-contrast": ("1.2.6", "MIT"),
}
PERMISSIVE = {"Apache-2.0", "MIT", "CC-BY-4.0"}


def fetch(name: str, target: Path) -> None:
    """Download one icon set and write its icons.json and info.json to `target`."""
    version, licence = PACKAGES[name]
    with tempfile.TemporaryDirectory() as folder:
        package = f"@iconify-json/{name}@{version}"
        packed = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True)
        with tarfile.open(Path(folder) / packed.stdout.decode().strip().splitlines()[-1]) as archive:
            icons, info = (archive.extractfile(f"package/{part}.json").read() for part in ("icons", "info"))
    found = json.loads(info)["license"]["spdx"]
    if found != licence or found not in PERMISSIVE:
        raise ValueError(f"{package} says its licence is {found!r}; expected {licence!r}, one of {sorted(PERMISSIVE)}")
    target.mkdir(parents=True, exist_ok=True)
    (target / "icons.json").write_bytes(icons)
    (target / "info.json").write_bytes(info)


def main(work: Path = Path("pocket-work")) -> None:
    """Fetch every icon set that is not there yet."""
    for name in track(PACKAGES, description="icon sets"):
        if not (work / "art" / name / "icons.json").exists():
            fetch(name, work / "art" / name)


if __name__ == "__main__":
    typer.run(main)
