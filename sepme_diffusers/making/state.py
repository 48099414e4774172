"""TrainingState: the file from which interrupted training goes on, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sepme_diffusers.bank.disk.files import replace_file
from sepme_diffusers.bank.disk.records import base_to_dict
from sepme_diffusers.bank.entry import BaseModel
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.learner import SHARED, Learner
from sepme_diffusers.making.plan import Plan
from sepme_diffusers.text.spelling import slug


class TrainingState:
    """A file from which interrupted training goes on, with the same result as without the interruption.

    Args:
        path: The file; written wholly or not at all.
        fingerprint: A digest of everything that the result depends on.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    @classmethod
    def of(
        cls,
        folder: Path,
        plans: Sequence[Plan],
        base: BaseModel,
        config: SepMEConfig,
        soft_guards: Tensor | None,
        pictures: Iterable[bytes],
    ) -> TrainingState:
        """Name the file of concepts that are trained together, and digest all that their result depends on.

        Args:
            folder: Where such files are kept.
            plans: One per concept.
            base: What the increments are made on.
            config: The settings.
            soft_guards: The covariance of the regular prompts, (d, d), or None.
            pictures: The pictures that the user gave, as bytes.
        """
        concepts = [plan.concept for plan in plans]
        depends_on = {
            "base": base_to_dict(base),
            "config": config.to_dict(),
            "concepts": [concept.to_dict() for concept in concepts],
            "guards": [list(plan.guards) for plan in plans],
            "soft guards": None if soft_guards is None else _digest(soft_guards.cpu().contiguous().numpy().tobytes()),
            "pictures": _digest(*pictures),
        }
        group = _digest(*(concept.name.encode() for concept in concepts))[:8]
        file = f"{slug(concepts[0].name)}-{group}.safetensors"
        return cls(folder / file, _digest(json.dumps(depends_on, sort_keys=True).encode()))

    def save(self, step: int, learners: Sequence[Learner], optimizer: torch.optim.Optimizer) -> None:
        """Write down where training is."""
        moments = optimizer.state_dict()["state"]
        tensors = {f"adam.{i}.{key}": torch.as_tensor(value) for i, of in moments.items() for key, value in of.items()}
        for i, learner in enumerate(learners):
            tensors |= {f"{i}.factor.{key}": factor.detach() for key, factor in learner.factors.items()}
            tensors |= {f"{i}.pictures.{key}": value for key, value in learner.pictures.state().items()}
        stops = [(each.stopped, each.stop.step, each.stop.value, each.stop.scale) for each in learners]
        self._write(tensors, {"step": step, "stops": stops})

    def finish(self, results: Sequence[tuple[Increment, Mapping[str, Any]]]) -> None:
        """Write down the increments that training ended with, and their metrics."""
        tensors = {
            f"{i}.{key}": t for i, (increment, _) in enumerate(results) for key, t in increment.tensors().items()
        }
        self._write(tensors, {"finished": [dict(metrics) for _, metrics in results]})

    def finished(self) -> list[tuple[Increment, dict[str, Any]]] | None:
        """Increments and metrics that an earlier run finished with, or None."""
        tensors, record = self._read()
        if "finished" not in record:
            return None
        results = []
        for i, metrics in enumerate(record["finished"]):
            own = {key.partition(".")[2]: t for key, t in tensors.items() if key.partition(".")[0] == str(i)}
            a, b = own.pop("A"), own.pop(SHARED, None)
            results.append((Increment(a, B=b, C=own or None), metrics))
        return results

    def restore(self, learners: Sequence[Learner], optimizer: torch.optim.Optimizer) -> int:
        """Bring learners and optimizer where they were; returns the steps taken."""
        tensors, record = self._read()
        if "step" not in record:
            return 0
        for i, (learner, stop) in enumerate(zip(learners, record["stops"], strict=True)):
            with torch.no_grad():
                for key, factor in learner.factors.items():
                    factor.copy_(tensors[f"{i}.factor.{key}"])
            prefix = f"{i}.pictures."
            learner.pictures.restore({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
            learner.stopped, learner.stop.step, learner.stop.value, learner.stop.scale = stop
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        return record["step"]

    def _write(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"fingerprint": self.fingerprint, "record": json.dumps(record)}
        replace_file(self.path, save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, metadata))

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not self.path.exists():
            return {}, {}
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            if metadata.get("fingerprint") == self.fingerprint:
                return tensors, json.loads(metadata["record"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} is not a training state: {error}; remove it to start anew") from error
        raise ValueError(
            f"{self.path} is the training state of other concepts, settings, guards or another base; give another "
            "folder, or remove it to start anew"
        )


def _digest(*parts: bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()
