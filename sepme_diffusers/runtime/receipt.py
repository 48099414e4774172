"""Receipt: what was in force for each picture of a call; a host's audit record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL.PngImagePlugin import PngInfo

from sepme_diffusers.runtime.calls import Call

_PNG_KEY = "sepme"


@dataclass(frozen=True, eq=False)
class Receipt:
    """What was in force for each picture of a call.

    Args:
        call: The call; it has ended.
        encoder: "verified" if guards were read on the pipeline's text encoder, "unverified" if it had none to ask,
            "not asked" if nothing was to be erased.
        text: "known" if the pipeline encoded the prompt, "unknown" if the caller brought embeddings.
        images: Image prompts that the call had, by argument; increments do not act on them.
    """

    call: Call
    encoder: str
    text: str
    images: tuple[str, ...] = ()

    @property
    def erased(self) -> tuple[dict[str, float], ...]:
        """For each picture the concepts that were erased, with their strengths."""
        shown = self.call.snapshot.names.shown
        sets = (self.call.set_of(picture) for picture in range(self.call.pictures))
        return tuple({shown[key]: strength for key, strength in strengths.items()} for strengths in sets)

    @cached_property
    def opened(self) -> tuple[dict[str, bool], ...]:
        """For each picture the erased concepts that have a gate, and whether its prompt opened it.

        Reading it waits for the device.
        """
        shown = self.call.snapshot.names.shown
        pictures: list[dict[str, bool]] = [{} for _ in range(self.call.pictures)]
        for active in self.call.active.stacks() if self.call.active is not None else ():
            # Whichever device ran the passes noted them on its own copy.
            copies = [copy.cpu() for copy in active.opened.copies()]
            if active.stack.gates is None:
                continue
            gated = active.stack.gates.squares.copies()[0].cpu() >= 0
            for index, key in enumerate(active.stack.slices):
                for picture, opened in enumerate(pictures):
                    if gated[index] and key in self.call.set_of(picture):
                        seen = any(bool(copy[picture, index]) for copy in copies)
                        opened[shown[key]] = opened.get(shown[key], False) or seen
        return tuple(pictures)

    @cached_property
    def banks(self) -> dict[str, str]:
        """The digest of each loaded bank, by its name."""
        return {name: bank.digest for name, bank in self.call.snapshot.banks.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {
            "banks": self.banks,
            "pictures": [
                {"erased": erased, "gates_opened": opened}
                for erased, opened in zip(self.erased, self.opened, strict=True)
            ],
            "encoder": self.encoder,
            "text": self.text,
            "images": list(self.images),
        }

    def png_info(self, picture: int = 0) -> PngInfo:
        """Return PNG text metadata for one picture: `image.save(path, pnginfo=pipe.last_call.png_info(0))`.

        Raises:
            IndexError: If the call had fewer pictures.
        """
        record = self.to_dict()
        pictures: list[Mapping[str, Any]] = record.pop("pictures")
        info = PngInfo()
        info.add_text(_PNG_KEY, json.dumps({**record, **pictures[picture]}, ensure_ascii=False))
        return info
