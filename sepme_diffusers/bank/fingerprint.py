"""Fingerprint: what tells one base from another."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sepme_diffusers.text.encoding import POOLED, TOKENS, Encoded

# A cast or a fused LoRA changes a weight's norm by less than this share, another checkpoint by more.
_SAME_NORM = 1e-2
# Half precision moves a sketch by less than this share; another encoder, layer or tokenizer moves it by more.
_SAME_SKETCH = 0.1
PROBES = ("", "a photo of a cat and a dog")
"""The prompts whose embeddings are sketched."""
_GROUPS = 32
_DECIMALS = 5


@dataclass(frozen=True)
class Encoding:
    """How text becomes the embedding that a denoiser is given at a door.

    Args:
        width: d, the numbers of a token.
        n_tokens: Tokens of a prompt; 1 for a pooled embedding.
        layer: The layer of the encoders that is read: "last" or "penultimate", or a "projection" behind the last.
        template: What the prompt is written into before it is encoded; "" for nothing.
        max_length: The tokens to which a prompt is padded or cut; None where it is not known.
        blank: What stands for the blank prompt: its embedding ("encoded"), or "zeros".
        sketch: Of the embedding of each of `PROBES`, see `sketch`; empty where it is not known.
    """

    width: int
    n_tokens: int = 1
    layer: str = "last"
    template: str = ""
    max_length: int | None = None
    blank: str = "encoded"
    sketch: tuple[tuple[float, ...], ...] = ()

    def differs(self, other: Encoding) -> str:
        """Say why another door is told the text in another way; empty if it is not, as far as both tell."""
        if self.width != other.width:
            return f"embeddings are {self.width} wide, not {other.width}"
        if self.n_tokens != other.n_tokens:
            return f"prompts have {self.n_tokens} tokens, not {other.n_tokens}"
        for what in ("layer", "template", "max_length", "blank"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if None not in (mine, theirs) and mine != theirs:
                return f"{what} is {mine!r}, not {theirs!r}"
        apart = _apart(self.sketch, other.sketch)
        return f"prompts are embedded in another way (by {apart:.2g} of a sketch)" if apart > _SAME_SKETCH else ""


@dataclass(frozen=True)
class Fingerprint:
    """What tells one base from another. What is None or empty was not looked at, and is not compared.

    Args:
        doors: How text becomes an embedding, by door. Doors that one of two bases does not name are not compared.
        vocabularies: {tokenizer: SHA-256 of its vocabulary}.
        projections: {module name: (d_out, Frobenius norm of W_m)} of the text projections of the denoiser.

    Example:
        >>> Fingerprint({"tokens": Encoding(768, 77)}).differs(Fingerprint({"tokens": Encoding(1024, 77)}))
        'embeddings are 768 wide, not 1024'
    """

    doors: Mapping[str, Encoding] = field(default_factory=dict)
    vocabularies: Mapping[str, str] = field(default_factory=dict)
    projections: Mapping[str, tuple[int, float]] | None = None

    @classmethod
    def of_text(cls, pipe: Any, encoded: Encoded | None = None) -> Fingerprint:
        """Take the fingerprint of a pipeline's text encoders, as it uses them.

        Args:
            pipe: A pipeline, see `text.encoding.encode_doors`. It needs no denoiser.
            encoded: Its embeddings, if some have been computed already.
        """
        penultimate = getattr(pipe, "text_encoder_2", None) is not None
        zeros = bool(getattr(pipe, "config", {}).get("force_zeros_for_empty_prompt", False))
        layers = {TOKENS: "penultimate" if penultimate else "last", POOLED: "projection"}
        how: dict[str, Any] = {
            "blank": "zeros" if zeros else "encoded",
            "max_length": getattr(getattr(pipe, "tokenizer", None), "model_max_length", None),
        }
        doors = {
            name: Encoding(embedding.shape[-1], embedding.shape[1], layers[name], **how, sketch=sketch(embedding))
            for name, embedding in (encoded or Encoded(pipe)).doors(PROBES).items()
        }
        return cls(doors, vocabularies(pipe))

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor]) -> Fingerprint:
        """Take the fingerprint of text projections W_m (d_out, d) by module name."""
        return cls(projections=heights_and_norms(weights))

    @property
    def text_side(self) -> Fingerprint:
        """What of it matters to text-side increments, which serve every base with the same text encoders."""
        return replace(self, projections=None)

    def differs(self, other: Fingerprint) -> str:
        """Say why the other is another base; empty if it is not, as far as both tell."""
        for name in (name for name in self.doors if name in other.doors):
            if reason := self.doors[name].differs(other.doors[name]):
                return reason if name == TOKENS else f"at the door {name!r} {reason}"
        both = sorted(self.vocabularies.keys() & other.vocabularies.keys())
        if wrong := [name for name in both if self.vocabularies[name] != other.vocabularies[name]]:
            return f"the vocabulary of {_some(wrong)} is another one"
        if self.projections is None or other.projections is None:
            return ""
        return _differing(self.projections, other.projections)


def sketch(embeddings: Tensor) -> tuple[tuple[float, ...], ...]:
    """Reduce embeddings (n_prompts, n_tokens, d) to 32 numbers per prompt, by which encoders can be told apart.

    Tokens are brought to length 1 and averaged; number i of the mean is added to group i mod 32.
    """
    means = normalize(embeddings.double().cpu(), dim=-1).mean(dim=1)
    groups = torch.zeros(len(means), _GROUPS, dtype=torch.float64, device="cpu")
    groups.index_add_(1, torch.arange(means.shape[1], device="cpu") % _GROUPS, means)
    return tuple(tuple(round(value, _DECIMALS) for value in row) for row in groups.tolist())


def vocabularies(pipe: Any) -> dict[str, str]:
    """Return the SHA-256 of each tokenizer's vocabulary: of the tokens in the order of their numbers, as JSON."""
    tokenizers = {
        name: part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None
    }
    return {name: _vocabulary(tokenizer) for name, tokenizer in tokenizers.items()}


def _vocabulary(tokenizer: Any) -> str:
    numbers = tokenizer.get_vocab()
    # Not what was added to it: a textual inversion adds tokens, and leaves the meaning of the others as it was.
    own = sorted((number, token) for token, number in numbers.items() if number < tokenizer.vocab_size)
    return hashlib.sha256(json.dumps([token for _, token in own], ensure_ascii=False).encode()).hexdigest()


def heights_and_norms(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, float]]:
    """Return {module name: (d_out, Frobenius norm)} of weights W_m (d_out, d)."""
    return {name: (len(weight), float(weight.float().norm())) for name, weight in weights.items()}


def _apart(mine: tuple[tuple[float, ...], ...], theirs: tuple[tuple[float, ...], ...]) -> float:
    """The largest distance of two sketches of one prompt, as a share of their length; 0 where one is not known."""
    if not mine or not theirs:
        return 0.0
    both = zip(mine, theirs, strict=False)
    return max(math.dist(a, b) / max(math.hypot(*a), math.hypot(*b), 1e-12) for a, b in both)


def _differing(mine: Mapping[str, tuple[int, float]], theirs: Mapping[str, tuple[int, float]]) -> str:
    if lacking := sorted(mine.keys() ^ theirs.keys()):
        return f"only one has the text projections {_some(lacking)}"
    if heights := [name for name, (d_out, _) in mine.items() if d_out != theirs[name][0]]:
        return f"text projections have other heights: {_some(heights)}"
    norms = [name for name, (_, n) in mine.items() if not math.isclose(n, theirs[name][1], rel_tol=_SAME_NORM)]
    return f"text projections have other weights: {_some(norms)}" if norms else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
