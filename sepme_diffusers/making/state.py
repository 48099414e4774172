"""TrainingState: a file from which interrupted training goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sepme_diffusers.bank.files import replace_file
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.learner import _SHARED, Learner


class TrainingState:
    """A file to go on from after an interruption, with the same result as without.

    Args:
        path: The file; written wholly or not at all.
        fingerprint: Of everything that the result depends on.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    def save(self, step: int, learners: Sequence[Learner], optimizer: torch.optim.Optimizer) -> None:
        """Write down where training is."""
        moments = optimizer.state_dict()["state"]
        tensors = {f"adam.{i}.{key}": torch.as_tensor(value) for i, of in moments.items() for key, value in of.items()}
        for i, one in enumerate(learners):
            tensors |= {f"{i}.factor.{key}": factor.detach() for key, factor in one.factors.items()}
            tensors |= {f"{i}.pictures.{key}": value for key, value in one.pictures.state().items()}
        stops = [(one.stopped, one.stop.step, one.stop.value, one.stop.scale) for one in learners]
        self._write(tensors, {"step": step, "stops": stops})

    def finish(self, increments: Sequence[Increment], metrics: Sequence[Mapping[str, Any]]) -> None:
        """Write down what came out."""
        tensors = {f"{i}.{key}": t for i, one in enumerate(increments) for key, t in one.tensors().items()}
        self._write(tensors, {"finished": [dict(some) for some in metrics]})

    def finished(self) -> list[tuple[Increment, dict[str, Any]]] | None:
        """Increments and metrics that an earlier run finished with, or None."""
        tensors, found = self._read()
        if "finished" not in found:
            return None
        made = []
        for i, metrics in enumerate(found["finished"]):
            own = {key.partition(".")[2]: t for key, t in tensors.items() if key.partition(".")[0] == str(i)}
            a, b = own.pop("A"), own.pop(_SHARED, None)
            made.append((Increment(a, B=b, C=own or None), metrics))
        return made

    def restore(self, learners: Sequence[Learner], optimizer: torch.optim.Optimizer) -> int:
        """Bring learners and optimizer where they were; returns the steps taken."""
        tensors, found = self._read()
        if "step" not in found:
            return 0
        for i, (one, stop) in enumerate(zip(learners, found["stops"], strict=True)):
            with torch.no_grad():
                for key, factor in one.factors.items():
                    factor.copy_(tensors[f"{i}.factor.{key}"])
            prefix = f"{i}.pictures."
            one.pictures.restore({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
            one.stopped, one.stop.step, one.stop.value, one.stop.scale = stop
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("adam."):
                _, i, name = key.split(".")
                moments.setdefault(int(i), {})[name] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        return found["step"]

    def _write(self, tensors: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"fingerprint": self.fingerprint, "found": json.dumps(found)}
        replace_file(self.path, save({key: t.cpu().contiguous() for key, t in tensors.items()}, metadata))

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not self.path.exists():
            return {}, {}
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            if metadata.get("fingerprint") == self.fingerprint:
                return tensors, json.loads(metadata["found"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} is no training state: {error}; remove it to start anew") from error
        raise ValueError(
            f"{self.path} is the training state of other concepts, settings, guards or another base; give another "
            "folder, or remove it to start anew"
        )
