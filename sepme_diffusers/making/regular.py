"""Regular prompts of a pipeline: what an increment should leave alone, and what it is calibrated by."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sepme_diffusers.algebra.closed_form import covariance
from sepme_diffusers.bank.disk.files import replace_file
from sepme_diffusers.bank.fingerprint import Fingerprint
from sepme_diffusers.making.calibration import RegularRows, made_for
from sepme_diffusers.making.kinds.kind import Kind
from sepme_diffusers.making.kinds.registry import find_kind, has_kind, model_folder
from sepme_diffusers.making.kinds.wording import word_concept
from sepme_diffusers.making.soft_guards import SoftGuards, is_about
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import TOKENS, Encoded, encode_doors, rows
from sepme_diffusers.text.lexicon import Lexicon, split
from sepme_diffusers.text.spelling import mentions

logger = logging.get_logger(__name__)

SIZES = (300, 1000, 3000)
"""How many regular prompts an increment is solved with, by default: the most that are encoded in ten minutes."""
CACHE = "SEPME_CACHE"
"""The environment variable that names the folder in which what was encoded is kept."""
_SECONDS = 600.0
_AT_A_TIME = 64
# By so many prompts it is told whether there is time for more than were kept.
_TRIED = 16
# Written down so often while prompts are encoded, so that an interrupted run goes on from there.
_SAVED_EVERY = 20.0
_NEIGHBOURS, _PROMPTS_EACH = 8, 15


def lexicon_of(pipe: Any) -> Lexicon:
    """Return the lexicon of regular prompts: the one that the model's folder brings, or the package's."""
    own = model_folder(pipe) / "lexicon.json"
    return Lexicon.from_file(own) if own.is_file() else Lexicon.everyday()


def regular_prompts(lexicon: Lexicon, size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return so many regular prompts to solve with, and a quarter as many to calibrate by."""
    return split(lexicon.prompts(size + size // 4))


def regular_guards(pipe: Any, size: int | None = None) -> SoftGuards:
    """Encode regular prompts, or read what was encoded before by the same text encoder.

    What was encoded is kept in the folder of `SEPME_CACHE`, by default `sepme` in that of `HF_HOME`.

    Args:
        pipe: The pipeline; only its text encoder is used.
        size: How many prompts. Default: 3,000, or fewer if that would take longer than ten minutes.

    Raises:
        ValueError: If the lexicon makes fewer.
    """
    lexicon = lexicon_of(pipe)
    file = _cache() / f"regular-{_key(pipe, lexicon)}.safetensors"
    guards = _kept(file)
    goal = size or SIZES[-1]
    solving, held_out = regular_prompts(lexicon, goal)
    if size is None and guards is not None and guards.held_out and len(guards.prompts) < goal:
        goal = max(_affordable_now(pipe, solving), len(guards.prompts))
    started, encoded, saved = time.monotonic(), 0, time.monotonic()
    if guards is not None and len(guards.prompts) >= goal:
        return guards if len(guards.prompts) == goal else SoftGuards.from_prompts(pipe, solving, held_out)
    with logging.tqdm(
        total=goal, initial=len(guards.prompts) if guards else 0, desc="regular prompts", delay=2
    ) as bar:
        while guards is None or len(guards.prompts) < goal:
            known = len(guards.prompts) if guards else 0
            part = SoftGuards.from_prompts(pipe, solving[known : min(known + _AT_A_TIME, goal)], ())
            guards = part if guards is None else guards.joined(part)
            encoded += len(part.prompts)
            bar.update(len(part.prompts))
            if size is None:
                goal = _affordable((time.monotonic() - started) / encoded, known + len(part.prompts))
                bar.total = goal
            if time.monotonic() - saved > _SAVED_EVERY:
                guards.save(file)
                saved = time.monotonic()
    solving, held_out = regular_prompts(lexicon, goal)
    guards = SoftGuards(guards.prompts, guards.covariance, guards.pooled, held_out)
    guards.save(file)
    return guards


def _affordable_now(pipe: Any, prompts: Sequence[str]) -> int:
    started = time.monotonic()
    SoftGuards.from_prompts(pipe, prompts[:_TRIED], ())
    return _affordable((time.monotonic() - started) / _TRIED, 0)


def _affordable(seconds_each: float, known: int) -> int:
    """The largest size that is encoded in ten minutes, and no less than is known already."""
    return max(*(size for size in SIZES if size * seconds_each <= _SECONDS or size == SIZES[0]), known)


def _cache() -> Path:
    return Path(os.environ.get(CACHE) or Path(HF_HOME) / "sepme")


def _key(pipe: Any, lexicon: Lexicon) -> str:
    """Name a text encoder and a lexicon by their content."""
    text = Fingerprint.of_text(pipe)
    doors = {name: asdict(door) for name, door in text.doors.items()}
    content = [
        doors,
        text.vocabularies,
        lexicon.captions,
        {slot: list(words) for slot, words in lexicon.words.items()},
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _kept(file: Path) -> SoftGuards | None:
    try:
        return SoftGuards.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.info("regular prompts are encoded anew: %s", error)
        return None


class Regular:
    """The regular prompts by which increments of a pipeline are solved for and calibrated.

    Args:
        pipe: The pipeline.
        encoded: Its embeddings.
        soft: Soft guards made of prompts; or their covariance alone, (d, d); or None.
        lexicon: Names of the sort of a concept, of which those that are near to it weigh more. None: there are none.
    """

    def __init__(
        self, pipe: Any, encoded: Encoded, soft: SoftGuards | Tensor | None, lexicon: Lexicon | None = None
    ) -> None:
        self.soft, self._pipe, self._encoded, self._lexicon = soft, pipe, encoded, lexicon
        self._rows: Mapping[str, RegularRows] = {}
        self._means: dict[str, Tensor] = {}
        # Of the last concept that was asked for.
        self._costs: tuple[Any, Tensor | None] = (None, None)
        self._prompts: dict[tuple[str, str], Sequence[str]] = {}
        self._prompts_near: tuple[Any, list[str]] = (None, [])

    @property
    def calibrates(self) -> bool:
        """Whether there are prompts that increments can be calibrated by."""
        return isinstance(self.soft, SoftGuards) and bool(self.soft.held_out)

    def covariance(self, concept: Concept, door: str = TOKENS) -> Tensor | None:
        """Return what moving regular prompts costs for a concept, (d, d), float64; None for nothing."""
        if not isinstance(self.soft, SoftGuards):
            return self.soft if door == TOKENS else None
        if (concept, door) != self._costs[0]:
            self._costs = (concept, door), self._cost(self.soft, concept, door)
        return self._costs[1]

    def _cost(self, soft: SoftGuards, concept: Concept, door: str) -> Tensor:
        cost = soft.without(self._pipe, concept, door)
        near = self._near(concept)
        solving = [near[index] for index in made_for(len(near))]
        return cost + covariance(rows(self._encoded.at(door)(solving))).to(cost) if solving else cost

    def rows(self, concept: Concept, door: str = TOKENS) -> RegularRows | None:
        """Return the regular prompts that a concept's increment is calibrated by; None if there are none."""
        if not isinstance(self.soft, SoftGuards) or not self.soft.held_out:
            return None
        if not self._rows:
            self._rows = _rows(self._pipe, self.soft.held_out)
        kept = self._rows[door].only([i for i, p in enumerate(self.soft.held_out) if not is_about(p, concept)])
        near = self._near(concept)
        held_out = [near[index] for index in sorted(set(range(len(near))) - set(made_for(len(near))))]
        return kept.joined(RegularRows.of(self._encoded.at(door)(held_out))) if held_out else kept

    def company(self, concept: Concept) -> list[str]:
        """Return the shortest regular prompts that are not about a concept: what stands beside its own ones."""
        prompts = self.soft.prompts if isinstance(self.soft, SoftGuards) else ()
        others = [prompt for prompt in prompts if not is_about(prompt, concept)]
        shortest = min((len(prompt.split()) for prompt in others), default=0)
        return [prompt for prompt in others if len(prompt.split()) == shortest]

    def neighbours(self, concept: Concept) -> tuple[str, ...]:
        """Return the names of the same sort that the text encoder reads most like the concept's, the nearest first."""
        kind = find_kind(str(concept.kind), self._pipe) if has_kind(concept.kind, self._pipe) else None
        if self._lexicon is None or kind is None or kind.neighbours is None:
            return ()
        own = (concept.name, *concept.aliases)
        names = self._lexicon.names(kind.neighbours)
        if kind.neighbours not in self._means:
            self._means[kind.neighbours] = _kept_means(self._pipe, self._lexicon, kind.neighbours)
        distances = (self._means[kind.neighbours] - _means(self._pipe, [concept.name])).norm(dim=1)
        nearest = [names[index] for index in distances.argsort().tolist()]
        return tuple(name for name in nearest if not mentions(name, own))[:_NEIGHBOURS]

    def _near(self, concept: Concept) -> list[str]:
        """Prompts that show the concept's neighbours."""
        if not has_kind(concept.kind, self._pipe):
            return []
        if concept != self._prompts_near[0]:
            kind = find_kind(str(concept.kind), self._pipe)
            prompts = (self._prompts_of(name, kind) for name in self.neighbours(concept))
            self._prompts_near = concept, [p for of_name in prompts for p in of_name if not is_about(p, concept)]
        return self._prompts_near[1]

    def _prompts_of(self, name: str, kind: Kind) -> Sequence[str]:
        """Some prompts that show what has this name; concepts have neighbours in common."""
        if (kind.kind, name) not in self._prompts:
            worded = word_concept(Concept(name, kind=kind.kind), kind, self._pipe.tokenizer)
            self._prompts[kind.kind, name] = worded.concept.prompts[:_PROMPTS_EACH]
        return self._prompts[kind.kind, name]


def _rows(pipe: Any, prompts: Sequence[str]) -> dict[str, RegularRows]:
    """Encode many prompts, of which nothing else is remembered: the rows of each door."""
    parts: dict[str, list[RegularRows]] = {}
    for start in range(0, len(prompts), _AT_A_TIME):
        for door, embeddings in encode_doors(pipe, prompts[start : start + _AT_A_TIME]).items():
            parts.setdefault(door, []).append(RegularRows.of(embeddings))
    return {door: first.joined(*rest) for door, (first, *rest) in parts.items()}


def _kept_means(pipe: Any, lexicon: Lexicon, slot: str) -> Tensor:
    """The mean token of each of the lexicon's words for a slot, read from the cache or encoded and kept there."""
    file = _cache() / f"names-{slot}-{_key(pipe, lexicon)}.safetensors"
    try:
        return load_file(file)["means"].to(pipe._execution_device)
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError, KeyError) as error:
        logger.info("names are encoded anew: %s", error)
    means = _means(pipe, lexicon.names(slot))
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, save({"means": means.cpu()}))
    return means


def _means(pipe: Any, names: Sequence[str]) -> Tensor:
    """The mean token of each name as a prompt, (n, d)."""
    encoded = Encoded(pipe, remembered=0)
    parts = [names[start : start + _AT_A_TIME] for start in range(0, len(names), _AT_A_TIME)]
    return torch.cat([encoded(part).mean(dim=1) for part in parts])
