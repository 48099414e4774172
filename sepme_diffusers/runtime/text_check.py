"""Whether a pipeline's text encoders give the embeddings that the loaded banks were made for, seen by guard prompts.

A guarded prompt reads nothing of an increment: ‖e Aᵀ‖ = 0, up to rounding. Another text encoder, other weights in it,
an adapter, another tokenizer or padding make it read something; a coarser precision makes it read a little. So what
the guards read on this pipeline now says both whether a bank belongs to it and what a reading must exceed to count.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sepme_diffusers.algebra.rounding import rounding_share
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.text.encoding import encode_doors

# What precision explains of a reading that should be zero, as a share of ‖e‖ ‖a‖: encoders round at every layer.
# Twelve layers in bfloat16 were seen to leave 2.4e-3, in float16 2.8e-4.
_EXPLAINED = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
_EXPLAINED_IN_FULL = 1e-4
# Guards vary in how they round: what counts must exceed what these read by this factor.
_MARGIN = 2.0
MOST_PROMPTS = 16
"""Guards that are encoded at most."""
EVERY = 50
"""They are encoded at the first call and every so many calls, also if nothing was seen to change."""
# Numbers of each parameter that are compared in every call, at least.
_SAMPLES = 64


@dataclass(frozen=True)
class _Basis:
    """The A of an increment at a door, as unit rows, with the prompts that must read nothing of it."""

    concept: str
    door: str
    rows: Tensor
    guards: frozenset[str]
    coarseness: float


class TextCheck:
    """What guards of some banks read on a pipeline.

    Args:
        banks: {name: bank}.
    """

    def __init__(self, banks: Mapping[str, ConceptBank]) -> None:
        self.banks = banks
        self._bases: list[_Basis] = []
        for bank in banks.values():
            for name, entry in bank.items():
                exact = frozenset(guard for guard in entry.guards if guard not in entry.metrics.get("leakage_of", {}))
                doors = {"tokens": entry.increment, **entry.increment.doors}
                for door, increment in doors.items():
                    a = increment.A.detach().float().cpu()
                    rows = a / a.norm(dim=1, keepdim=True).clamp(min=1e-12)
                    self._bases.append(_Basis(name, door, rows, exact, increment.coarseness))
        guards = sorted(set().union(*(basis.guards for basis in self._bases))) if self._bases else []
        # Evenly among all, the blank prompt first.
        self.prompts = guards[:: max(1, -(-len(guards) // MOST_PROMPTS))]
        self._lock = threading.Lock()
        self._calls = 0
        self._state: Any = None
        self._least = 0.0

    def least(self, pipe: Any, **settings: Any) -> float:
        """Return what a reading must exceed to count on this pipeline, as a share of ‖e‖ ‖a‖.

        Measured at the first call, whenever something that the embeddings depend on has changed, and at every 50th.

        Args:
            pipe: The pipeline.
            settings: Of its `encode_prompt`, as the call has them (`clip_skip`, `lora_scale`).

        Raises:
            ErasureNotInForce: If guards read more than precision explains, with the concepts; or if the call asks for
                another layer of the text encoder.
        """
        if skipped := settings.get("clip_skip"):
            raise ErasureNotInForce(
                "the bank was made for the layer of the text encoder that the pipeline reads by itself, its last one "
                f"in Stable Diffusion 1, and clip_skip={skipped} reads another one. Leave clip_skip out"
            )
        if not self.prompts:
            return 0.0
        with self._lock:
            state = (_state(pipe, self.prompts), sorted(settings.items(), key=str))
            if state != self._state or self._calls % EVERY == 0:
                self._least = self._measured(pipe, settings)
                self._state = state
            self._calls += 1
            return self._least

    def _measured(self, pipe: Any, settings: Mapping[str, Any]) -> float:
        embeddings = encode_doors(pipe, self.prompts, **settings)
        normed = {door: torch.nn.functional.normalize(rows.float().cpu(), dim=-1) for door, rows in embeddings.items()}
        largest, foreign = 0.0, {}
        explained = _explained(pipe)
        for basis in self._bases:
            chosen = [index for index, prompt in enumerate(self.prompts) if prompt in basis.guards]
            if basis.door not in normed or not chosen:
                continue
            if normed[basis.door].shape[-1] != basis.rows.shape[-1]:
                raise ErasureNotInForce(
                    f"the text encoder has changed: its embeddings are {normed[basis.door].shape[-1]} wide, and the "
                    f"increment of {basis.concept!r} is for {basis.rows.shape[-1]}"
                )
            read = float((normed[basis.door][chosen] @ basis.rows.T).abs().max())
            stored = rounding_share(basis.rows.shape[-1], basis.coarseness)
            if not read <= explained + stored:
                foreign[basis.concept] = round(read, 4)
            largest = max(largest, read)
        if foreign:
            raise ErasureNotInForce(
                "the text encoder has changed since the bank was loaded, or is not the one that it was made for: "
                f"prompts that the increments guard are read by them (share of the embedding: {foreign}). Undo what "
                "changed the text encoder or tokenizer, or load a bank that was made with them"
            )
        return _MARGIN * largest

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def _explained(pipe: Any) -> float:
    """What the precision of a pipeline's text encoders explains of a reading that should be zero."""
    dtypes = {parameter.dtype for encoder in text_encoders(pipe) for parameter in encoder.parameters()}
    dtypes |= {dtype for _, enabled, dtype in _autocast(pipe) if enabled}
    return max((_EXPLAINED.get(dtype, _EXPLAINED_IN_FULL) for dtype in dtypes), default=_EXPLAINED_IN_FULL)


def text_encoders(pipe: Any) -> list[nn.Module]:
    """The text encoders of a pipeline, in the order of its components."""
    found = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    return [part for part in found.values() if isinstance(part, nn.Module)]


def _state(pipe: Any, prompts: list[str]) -> Any:
    """What embeddings depend on, by samples: cheap enough for every call."""
    tokenizers = [part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None]
    ids = [_ids(tokenizer, prompts[:2]) for tokenizer in tokenizers]
    encoders = [_encoder_state(encoder) for encoder in text_encoders(pipe)]
    return ids, encoders, _autocast(pipe)


def _autocast(pipe: Any) -> list[tuple[str, bool, torch.dtype]]:
    """For each kind of device that holds a text encoder, whether autocast is on, and its precision."""
    kinds = {parameter.device.type for encoder in text_encoders(pipe) for parameter in encoder.parameters()}
    known = [kind for kind in sorted(kinds) if kind != "meta"]
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in known]


def _ids(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    length = min(tokenizer.model_max_length, 512)
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids


@torch.no_grad()
def _encoder_state(encoder: nn.Module) -> Any:
    modules = list(encoder.modules())
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    adapters = [_adapter_state(module) for module in modules if isinstance(module, BaseTunerLayer)]
    return id(encoder), encoder.training, [(p.dtype, p.shape) for p in parameters], _samples(parameters), adapters


def _adapter_state(layer: Any) -> Any:
    """Which adapters of a PEFT layer act, and how strongly."""
    scaling = sorted(getattr(layer, "scaling", {}).items())
    return layer.disable_adapters, scaling, list(layer.active_adapters), layer.merged


def _samples(parameters: Iterable[Tensor]) -> list[bytes]:
    """Some numbers of every parameter, put together before they are transferred: a GPU is waited for once."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in (part for parameter in parameters for part in _parts(parameter)):
        if tensor.numel() and not tensor.is_meta:
            sample = tensor.reshape(-1)[:: max(1, tensor.numel() // _SAMPLES)]
            kinds.setdefault((tensor.device, tensor.dtype), []).append(sample)
    return [torch.cat(samples).float().cpu().numpy().tobytes() for samples in kinds.values()]


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: those of quantisers wrap several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]
