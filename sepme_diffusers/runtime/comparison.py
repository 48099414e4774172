"""Comparison: the same prompts from the same noise under several erased sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import torch
from PIL import Image

from sepme_diffusers.runtime.call_sets import ErasedSet, Request, default_set, set_with_floors
from sepme_diffusers.runtime.changes import Change
from sepme_diffusers.runtime.contact_sheet import as_data_uri, as_png, contact_sheet
from sepme_diffusers.runtime.snapshot import Snapshot
from sepme_diffusers.text.names import listed

# What a comparison says itself in each of its calls.
_OWN = {
    "erased": "say the sets by sets=",
    "generator": "say the noise by seeds=",
    "output_type": "it is 'pil'",
    "return_dict": "it is True",
    "num_images_per_prompt": "give the prompt several times",
}
# Pixels of the shorter side, below which a sheet enlarges pictures.
_LEAST_SIDE = 128
# Pixels of the longer side, above which a notebook's page shows them smaller.
_MOST_SIDE = 320
_NAMED = 3


@dataclass(frozen=True, eq=False)
class Comparison:
    """The same prompts from the same noise, once per erased set; notebooks show it as a table.

    Args:
        prompts: One per row.
        seeds: Of the noise, one per row.
        columns: What each column's set is called.
        images: Rows by prompt, columns by set.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, pocket
        >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
        >>> pipe.load_sepme(pocket.bank("styles"))
        >>> pipe.set_erased(["neon"])
        >>> comparison = pipe.compare("a neon fox", num_inference_steps=4)
        >>> comparison.columns
        ('nothing erased', 'erased: neon', 'restored')
        >>> comparison.changes[0][2].largest
        0
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    columns: tuple[str, ...]
    images: tuple[tuple[Image.Image, ...], ...]

    @cached_property
    def changes(self) -> tuple[tuple[Change, ...], ...]:
        """How far each picture is from that of the first column, in the order of `images`."""
        return tuple(tuple(Change.between(picture, row[0]) for picture in row) for row in self.images)

    def sheet(self) -> Image.Image:
        """Lay out all pictures in one, a row per prompt and a column per set, with what each row moved by."""
        labels = [
            "\n".join([prompt or "(blank prompt)", *(f"{i}: {change}" for i, change in enumerate(row[1:], 2))])
            for prompt, row in zip(self.prompts, self.changes, strict=True)
        ]
        headers = [f"{i}: {column}" for i, column in enumerate(self.columns, 1)]
        scale = max(1, -(-_LEAST_SIDE // min(self.images[0][0].size)))
        return contact_sheet(self.images, labels, headers, scale)

    def _repr_png_(self) -> bytes:
        return as_png(self.sheet())

    def _repr_html_(self) -> str:
        heads = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        rows = (
            f"<tr><th>{escape(prompt)}<br>seed {seed}</th>{''.join(map(_cell, images, changes))}</tr>"
            for prompt, seed, images, changes in zip(self.prompts, self.seeds, self.images, self.changes, strict=True)
        )
        return f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(image: Image.Image, change: Change) -> str:
    return f'<td><img alt="" src="{as_data_uri(image, _MOST_SIDE)}"><br>{change}</td>'


def compare(
    pipe: Any,
    snapshot: Snapshot,
    request: Request,
    prompt: str | Sequence[str],
    sets: Sequence[ErasedSet | None] | None,
    seeds: int | Sequence[int],
    call: Mapping[str, Any],
) -> Comparison:
    """Draw prompts under several erased sets; see `SepMELoaderMixin.compare`.

    Args:
        pipe: The pipeline.
        snapshot: What is loaded.
        request: What applies to its calls.
        prompt: One or several.
        sets: The sets; None for the standard ones.
        seeds: One for all prompts, or one each.
        call: Passed on.
    """
    if said := [name for name in _OWN if name in call]:
        raise TypeError(f"compare() takes no {said[0]!r}: {_OWN[said[0]]}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("compare() needs a prompt; [] has none")
    per_prompt = [seeds] * len(prompts) if isinstance(seeds, int) else list(seeds)
    if len(per_prompt) != len(prompts):
        raise ValueError(
            f"{len(per_prompt)} seeds for {len(prompts)} prompts; give one seed per prompt, or one for all"
        )
    columns = _columns(sets, snapshot, request)
    drawn = [draw(pipe, prompts, erased, per_prompt, call) for _, erased in columns]
    rows = tuple(zip(*drawn, strict=True))
    return Comparison(tuple(prompts), tuple(per_prompt), tuple(name for name, _ in columns), rows)


def draw(
    pipe: Any, prompts: Sequence[str], erased: ErasedSet | None, seeds: Sequence[int], call: Mapping[str, Any]
) -> list[Image.Image]:
    """Draw one picture per prompt, each from noise of its own, made on the CPU: it is the same on every device.

    Args:
        pipe: The pipeline.
        prompts: What to draw.
        erased: What this call erases; None for the standing set.
        seeds: Of the noise, one per prompt.
        call: Further arguments of the pipeline.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return list(pipe(prompt=list(prompts), erased=erased, generator=generators, output_type="pil", **call).images)


def _columns(
    sets: Sequence[ErasedSet | None] | None, snapshot: Snapshot, request: Request
) -> list[tuple[str, dict[str, float]]]:
    """Say of each column what it is called and what it erases. Meanwhile others may change what is loaded."""
    if sets is None:
        if not default_set(snapshot, request):
            raise ValueError("nothing is erased that could be compared; set_erased([...]) first, or say sets=")
        nothing, erased, _ = _columns([[], None, []], snapshot, request)
        return [nothing, erased, ("restored", nothing[1])]
    if not listed(sets):
        raise ValueError("compare() needs an erased set; sets=[] has none. sets=[[]] erases nothing")
    chosen = [set_with_floors(concepts, snapshot, request) for concepts in sets]
    named = [{snapshot.names.shown[key]: strength for key, strength in strengths.items()} for strengths in chosen]
    return [(_called(strengths), strengths) for strengths in named]


def _called(strengths: Mapping[str, float]) -> str:
    names = [name if strength == 1 else f"{name} × {strength:g}" for name, strength in strengths.items()]
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return f"erased: {', '.join([*names[:_NAMED], *more])}" if names else "nothing erased"
