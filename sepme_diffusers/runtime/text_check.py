"""Whether a pipeline's text encoders still give the embeddings that the loaded banks were made for.

Seen by what guarded prompts read on them, see `bank.guard_readings`, and before each call by a sample of what the
embeddings depend on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.guard_readings import GuardReadings, sampled
from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.runtime.erased_sets import Key
from sepme_diffusers.runtime.samples import samples
from sepme_diffusers.text.encoders import autocast_of, text_encoders
from sepme_diffusers.text.names import some

# Guards vary in how they round: what counts must exceed what these read by this factor.
_MARGIN = 2.0
EVERY = 50
"""Guards are encoded at the first call and every so many calls, also if nothing was seen to change."""


class TextCheck:
    """What guards of some banks read on a pipeline, measured when it may have changed.

    Args:
        banks: {name: bank}.
    """

    def __init__(self, banks: Mapping[str, ConceptBank]) -> None:
        self.banks = banks
        entries = sampled(banks)
        self._sampled, self._readings = frozenset(entries), GuardReadings(entries)
        # Reentrant, so that an interrupt between acquiring and releasing it cannot shut its own thread out.
        self._lock = threading.RLock()
        self._calls = 0
        # By the settings of `encode_prompt`: the state that was measured, what a reading must exceed there, and the
        # same for increments that are not in the sample.
        self._known: dict[str, tuple[Any, float, dict[Key, float]]] = {}

    @property
    def prompts(self) -> list[str]:
        """The guards that are encoded."""
        return self._readings.prompts

    def least(self, pipe: Any, keys: Iterable[Key], **settings: Any) -> float:
        """Return what a reading must exceed to count on this pipeline, as a share of ‖e‖ ‖a‖.

        Measured at the first call, whenever something that the embeddings depend on has changed, and at every 50th.

        Of banks of very many concepts a sample is measured, and of the others those that are asked for.

        Args:
            pipe: The pipeline.
            keys: The concepts that shall act.
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
            state, chosen = _state(pipe, self.prompts), str(sorted(settings.items()))
            known, least, others = self._known.get(chosen, (None, 0.0, {}))
            if state != known or self._calls % EVERY == 0:
                least, others = max(_measured(self._readings, pipe, settings).values(), default=0.0), {}
                self._known = {**dict(list(self._known.items())[-7:]), chosen: (state, least, others)}
            rest = [key for key in keys if key not in self._sampled]
            if new := {key: self.banks[key[0]].entries.outline(key[1]) for key in rest if key not in others}:
                others |= _measured(GuardReadings(new), pipe, settings)
            self._calls += 1
            return max([least, *(others[key] for key in rest)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()


def _measured(readings: GuardReadings, pipe: Any, settings: Mapping[str, Any]) -> dict[Any, float]:
    """What a reading must exceed for each increment on a pipeline, or an exception."""
    try:
        reading = readings.measure(pipe, **settings)
    except ValueError as error:
        raise ErasureNotInForce(f"the text encoder has changed: {error}") from error
    if reading.foreign:
        raise ErasureNotInForce(
            "the text encoder has changed since the bank was loaded, or is not the one that it was made for: "
            "prompts that the increments guard are read by them (share of the embedding: "
            f"{some(reading.foreign.items())}). Undo what changed the text encoder or tokenizer, or load a bank that "
            "was made with them"
        )
    return {key: _MARGIN * largest for key, largest in reading.largest.items()}


def _state(pipe: Any, prompts: list[str]) -> Any:
    """What embeddings depend on, by samples: cheap enough for every call."""
    tokenizers = [part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None]
    ids = [_ids(tokenizer, prompts[:2]) for tokenizer in tokenizers]
    encoders = [_encoder_state(encoder) for encoder in text_encoders(pipe)]
    return ids, encoders, autocast_of(pipe)


def _ids(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    length = min(tokenizer.model_max_length, 512)
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids


@torch.no_grad()
def _encoder_state(encoder: nn.Module) -> Any:
    modules = list(encoder.modules())
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    adapters = [_adapter_state(module) for module in modules if isinstance(module, BaseTunerLayer)]
    return id(encoder), encoder.training, [(p.dtype, p.shape) for p in parameters], samples(parameters), adapters


def _adapter_state(layer: Any) -> Any:
    """Which adapters of a PEFT layer act, and how strongly."""
    scaling = sorted(getattr(layer, "scaling", {}).items())
    return layer.disable_adapters, scaling, list(layer.active_adapters), layer.merged
