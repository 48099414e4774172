"""Pictures that are kept under the hash of what decides them, so that none is drawn twice."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from PIL import Image
from torch import nn

from sepme_diffusers.bank.disk.files import replace_file
from sepme_diffusers.bank.fingerprint import vocabularies
from sepme_diffusers.runtime.contact_sheet import as_png
from sepme_diffusers.runtime.samples import samples

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class KeptPictures:
    """Pictures in a folder, each in a file named by the hash of what decides it.

    Args:
        folder: The folder; it is there.
        shared: What decides all of them: JSON values.
    """

    folder: Path
    shared: Mapping[str, Any]

    def get(self, own: Mapping[str, Any], draw: Callable[[], Image.Image]) -> Image.Image:
        """Return the picture that is kept; or draw it, and keep it as soon as it is finished.

        Args:
            own: What decides this picture, beside what is shared.
            draw: Draws it.
        """
        decided_by = json.dumps({**self.shared, **own}, sort_keys=True).encode()
        path = self.folder / f"{hashlib.sha256(decided_by).hexdigest()[:32]}.png"
        try:
            with Image.open(path) as kept:
                return kept.convert("RGB")
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("%s is drawn anew: %s", path, error)
        picture = draw().convert("RGB")
        replace_file(path, as_png(picture))
        return picture


def folder_for_pictures(output: Path) -> Path:
    """Make the folder in which pictures are kept, and check that files can be written there.

    Raises:
        OSError: If they cannot.
    """
    folder = output / "pictures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(f"cannot write into {folder}: {error.strerror}; choose another output folder") from error


def base_facts(pipe: Any) -> dict[str, Any]:
    """Say what of a pipeline decides its pictures, as JSON values: weights by samples, settings, where it runs."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    hashed = hashlib.sha256()
    for module in modules.values():
        for numbers in samples([*module.parameters(), *module.buffers()]):
            hashed.update(numbers)
    own = {key: value for key, value in pipe.config.items() if not key.startswith("_") and key not in pipe.components}
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return {
        "pipeline": type(pipe).__name__,
        "parts": sorted(modules),
        "weights": hashed.hexdigest(),
        "settings": repr(sorted(own.items())),
        "scheduler": [type(pipe.scheduler).__name__, repr(sorted(scheduler.items()))],
        "vocabularies": vocabularies(pipe),
        "device": pipe.device.type,
        "dtype": str(pipe.dtype),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "sepme-diffusers")},
    }
