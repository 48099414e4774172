"""Soft guards: regular prompts that an increment should change little, remembered by their covariance; its file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sepme_diffusers.algebra.closed_form import covariance, nearest_covariance
from sepme_diffusers.bank.disk.files import replace_file
from sepme_diffusers.doors.family import POOLED, TOKENS
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import encode_doors, rows
from sepme_diffusers.text.lexicon import split
from sepme_diffusers.text.spelling import mentions

_AT_A_TIME = 1024
# Of so many prompts on, every fifth is held out.
_ENOUGH = 10
# A file's float32 leaves less than this share of its largest direction.
_ROUNDING = 1e-3
_FORMAT = "sepme_soft_guards"


@dataclass(frozen=True, eq=False)
class SoftGuards:
    """Regular prompts and the mean outer product of their tokens.

    Args:
        prompts: The prompts.
        covariance: SᵀS / n over all their tokens, (d, d).
        pooled: The same over their pooled embeddings, (d_pooled, d_pooled); None where the pipeline has none.
        held_out: More regular prompts, which no increment is solved with: it is calibrated by them.

    Raises:
        ValueError: If there are no prompts, or a covariance is not a finite symmetric matrix.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, pocket
        >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
        >>> SoftGuards.from_prompts(pipe, ["a cat", "a dog"]).covariance.shape
        torch.Size([384, 384])
    """

    prompts: tuple[str, ...]
    covariance: Tensor
    pooled: Tensor | None = None
    held_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("soft guards need at least one prompt")
        for c in self._covariances().values():
            square = c.ndim == 2 and c.shape[0] == c.shape[1]
            if not square or not torch.isfinite(c).all() or not torch.allclose(c, c.T, rtol=1e-4, atol=1e-6):
                raise ValueError(
                    f"the covariance must be a finite symmetric matrix (d, d), not of shape {tuple(c.shape)}"
                )

    @classmethod
    def from_prompts(cls, pipe: Any, prompts: Sequence[str], held_out: Sequence[str] | None = None) -> SoftGuards:
        """Make soft guards of prompts; they are encoded in parts, so that there may be very many.

        Args:
            pipe: The pipeline.
            prompts: The prompts.
            held_out: Prompts to calibrate by. Default: every fifth of the prompts, if they are ten or more.

        Raises:
            TypeError: If a single string is given.
            ValueError: If there are none.
        """
        if isinstance(prompts, str):
            raise TypeError(f"give a list of prompts: [{prompts!r}], not {prompts!r}")
        prompts = tuple(dict.fromkeys(prompts))
        if not prompts:
            raise ValueError("soft guards need at least one prompt")
        if held_out is None:
            prompts, held_out = split(prompts) if len(prompts) >= _ENOUGH else (prompts, ())
        means = _mean_covariances(pipe, prompts)
        return cls(prompts, means[TOKENS], means.get(POOLED), tuple(held_out))

    @classmethod
    def from_file(cls, pipe: Any, path: str | Path) -> SoftGuards:
        """Make soft guards of a text file of prompts, one per line.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it has no prompts.
        """
        lines = (line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
        return cls.from_prompts(pipe, [line for line in lines if line])

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file, wholly or not at all: d (d + 1) / 2 float64 per door, and the prompts."""
        triangles = {
            name: matrix.double().cpu()[_upper(len(matrix))].contiguous()
            for name, matrix in self._covariances().items()
        }
        lists = {"prompts": self.prompts, "held_out": self.held_out}
        metadata = {"format": _FORMAT, "version": "1"}
        metadata |= {name: json.dumps(texts, ensure_ascii=False) for name, texts in lists.items()}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save(triangles, metadata))

    @classmethod
    def load(cls, path: str | Path) -> SoftGuards:
        """Read what `save` wrote.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it holds something else.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                matrices = {name: _symmetric(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
            prompts, held_out = (tuple(map(str, json.loads(metadata[name]))) for name in ("prompts", "held_out"))
            covariance, pooled = matrices["covariance"], matrices.get("pooled")
            known = (metadata.get("format"), metadata.get("version")) == (_FORMAT, "1")
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} holds no soft guards that this version can read: {error}") from error
        if not known:
            raise ValueError(f"{path} holds no soft guards that this version can read: {metadata}")
        return cls(prompts, covariance, pooled, held_out)

    def without(self, pipe: Any, concept: Concept, door: str = TOKENS) -> Tensor:
        """Return the covariance of the prompts that neither name the concept nor are its own, (d, d), float64.

            (n S − n_own S_own) / (n − n_own)

        Nobody can erase a concept and leave its prompts alone, so one list of regular prompts serves every concept.

        Args:
            pipe: The pipeline whose text encoder the covariance was made with.
            concept: The concept.
            door: The door whose embeddings are meant, "tokens" or "pooled".

        Raises:
            ValueError: If no prompt is left, or they are of another text encoder.
        """
        whole = self.covariance if door == TOKENS else self.pooled
        if whole is None:
            raise ValueError(f"the soft guards were made with a pipeline without the door {door!r}; make them anew")
        own = self.about(concept)
        if not own:
            return self._nearest[door]
        if len(own) == len(self.prompts):
            raise ValueError(f"every soft guard prompt is about {concept.name!r}; give regular ones")
        share = len(own) / len(self.prompts)
        own_covariance = _mean_covariances(pipe, own)[door].to(whole.device)
        left = (whole.double() - share * own_covariance) / (1 - share)
        nearest = nearest_covariance(left)
        if torch.linalg.matrix_norm(left - nearest, 2) > _ROUNDING * torch.linalg.matrix_norm(left, 2):
            raise ValueError("the soft guards were made with another text encoder than the pipeline's; make them anew")
        return nearest

    def joined(self, other: SoftGuards) -> SoftGuards:
        """Join the prompts of both, made with one text encoder."""
        n, m = len(self.prompts), len(other.prompts)

        def mean(mine: Tensor, theirs: Tensor) -> Tensor:
            return (n * mine.double() + m * theirs.double()) / (n + m)

        pooled = None if self.pooled is None or other.pooled is None else mean(self.pooled, other.pooled)
        whole = mean(self.covariance, other.covariance)
        return SoftGuards(self.prompts + other.prompts, whole, pooled, self.held_out + other.held_out)

    def about(self, concept: Concept) -> list[str]:
        """Return the prompts that name a concept or are its own."""
        return [prompt for prompt in self.prompts if is_about(prompt, concept)]

    @cached_property
    def _nearest(self) -> dict[str, Tensor]:
        """The covariances by door, positive semi-definite; the same tensors for every concept."""
        by_door = {TOKENS: self.covariance} | ({} if self.pooled is None else {POOLED: self.pooled})
        return {door: nearest_covariance(covariance) for door, covariance in by_door.items()}

    def _covariances(self) -> dict[str, Tensor]:
        return {"covariance": self.covariance} | ({} if self.pooled is None else {"pooled": self.pooled})


def is_about(prompt: str, concept: Concept) -> bool:
    """Tell whether a prompt names a concept or is one of its own."""
    return mentions(prompt, (concept.name, *concept.aliases)) or prompt in concept.prompts


def _mean_covariances(pipe: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return SᵀS / n over the prompts' rows, by door."""
    sums: dict[str, Tensor] = {}
    for start in range(0, len(prompts), _AT_A_TIME):
        part = prompts[start : start + _AT_A_TIME]
        for door, embeddings in encode_doors(pipe, part).items():
            sums[door] = sums.get(door, 0) + len(part) * covariance(rows(embeddings))
    return {door: total / len(prompts) for door, total in sums.items()}


def _symmetric(triangle: Tensor) -> Tensor:
    """Return the symmetric matrix (d, d) with this upper triangle, row by row."""
    d = round((2 * len(triangle) + 0.25) ** 0.5 - 0.5)
    matrix = torch.zeros(d, d, dtype=torch.float64)
    matrix[_upper(d)] = triangle.double()
    return matrix + matrix.triu(1).T


def _upper(d: int) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(d, d)
    return first, second


def as_soft_guards(pipe: Any, guards: SoftGuards | Tensor | Iterable[str]) -> SoftGuards | Tensor | None:
    """Make soft guards of soft guards, a covariance, or prompts; None for no prompts.

    Raises:
        TypeError: If a single string is given: a path, perhaps, for which there is `SoftGuards.load`.
    """
    if isinstance(guards, Tensor):
        return nearest_covariance(guards)
    if isinstance(guards, SoftGuards):
        return guards
    prompts = guards if isinstance(guards, str) else list(guards)
    return SoftGuards.from_prompts(pipe, prompts) if prompts else None
