"""Whether a bank's adapters do what its increments do. Trusts nothing that it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.nn.functional import pad

from sepme_diffusers.bank.adapters import Adapters, KnownDenoiser
from sepme_diffusers.bank.disk.layout import LORA_CONFIG, LORA_FILE
from sepme_diffusers.bank.entry import BaseModel
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.peft_form import Factors, factors_of, from_lora, lora, peft_files

# What rounding to float16 changes of a product's norm, generously: half of this for each of its factors.
_ROUNDED = 2 * torch.finfo(torch.float16).eps
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AdapterCheck:
    """Checks adapters, with the weights of their base if a pipeline has them.

    Args:
        base: The bank's.
        pipe: A pipeline, only read. Default: what weights make of an increment is not compared.
    """

    def __init__(self, base: BaseModel, pipe: Any = None) -> None:
        self._base, self._pipe = base, pipe
        # By concept: those that were solved for once more, as far as they change the text projections.
        self.solved_again: dict[str, Increment] = {}
        self._unchecked: list[str] = []

    @cached_property
    def _maker(self) -> Adapters | None:
        """What would make the adapters anew; None without a denoiser for which there could be any."""
        with suppress(TypeError, ValueError):
            denoiser = KnownDenoiser() if self._pipe is None else KnownDenoiser.of(self._pipe)
            return Adapters(self._base, denoiser.module, denoiser.name) if denoiser.module is not None else None
        return None

    @property
    def notes(self) -> list[str]:
        """What could not be checked, and why."""
        notes = []
        if self._unchecked:
            notes.append(
                f"the adapters of {_some(self._unchecked)} were not compared with what their base's weights make of "
                "the increments: that takes a pipeline of that base"
            )
        if self.solved_again:
            notes.append(
                f"the adapters of {_some(list(self.solved_again))} were solved for without a gate: only their guards, "
                "and the names of the modules that they change, were checked"
            )
        return notes

    def faults(
        self, name: str, record: Mapping[str, Any], files: Mapping[str, bytes], increment: Increment
    ) -> Iterator[str]:
        """List what is wrong with a concept's adapter.

        Args:
            name: The concept's.
            record: The concept's.
            files: The adapter's by name, which are what their hashes say.
            increment: The concept's.
        """
        try:
            factors = _factors(files[LORA_FILE])
        except (SafetensorError, ValueError) as error:
            yield f"its adapter is not a LoRA that tools read: {error}"
            return
        if wrong := other_settings(files[LORA_CONFIG], peft_files(*lora(factors))[LORA_CONFIG]):
            yield f"its adapter's {LORA_CONFIG} tells other tools something else than the weights: {wrong}"
        maker = self._maker if self._maker and self._maker.name == record["adapter"]["base"] else None
        if maker is None:
            self._unchecked.append(name)
        if record["adapter"]["of"] == record["digest"]:
            yield from _unlike(factors, increment, maker)
        elif not record.get("gates") and not increment.doors:
            yield "its adapter is said to be of another increment, which only one with a gate or further doors needs"
        elif maker is not None:
            yield from self._keep(name, factors, maker)

    def _keep(self, name: str, factors: Factors, maker: Adapters) -> Iterator[str]:
        """Keep what an adapter that was solved for once more changes, of which the leakage can be measured."""
        if wrong := sorted(factors.keys() - maker.weights.keys() - {module for module, _ in maker.linears.values()}):
            yield f"its adapter changes modules that do not read the text alone: {_some(wrong)}"
            return
        try:
            tensors = lora({module: factors[module] for module in maker.weights})[0]
            self.solved_again[name] = from_lora(tensors)
        except (KeyError, ValueError) as error:
            yield f"its adapter is not an increment's: {error}"


def _unlike(factors: Factors, increment: Increment, maker: Adapters | None) -> Iterator[str]:
    """List in what an adapter is not what its increment is, or what the maker makes of that."""
    if reading := [module for module, (a, _) in factors.items() if _reads_more(a, increment)]:
        yield f"its adapter reads what its increment does not, in {_some(reading)}"
    if maker is None:
        return
    try:
        wanted = maker.factors(increment)
    except ValueError as error:
        yield f"its adapter cannot be the increment's: {error}"
        return
    if strange := sorted(wanted.keys() ^ factors.keys()):
        yield f"its adapter changes other modules than its increment does: {_some(strange)}"
        return
    # Weights that were loaded in half precision are not exactly those that the adapter was made with.
    rounded = max(_ROUNDED, *(2 * torch.finfo(weight.dtype).eps for weight in maker.weights.values()))
    if other := [module for module in wanted if _apart(factors[module], wanted[module], rounded)]:
        yield f"its adapter does something else than its increment with these weights of its base, in {_some(other)}"


def other_settings(data: bytes, ours: bytes) -> list[str]:
    """List the settings of a PEFT config that differ from ours.

    Args:
        data: Its bytes, as they were found.
        ours: The bytes as they should be.
    """
    wanted = json.loads(ours)
    try:
        theirs = dict(json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return ["it is not JSON"]
    # Releases of PEFT differ in which settings they write that are off.
    keys = (wanted.keys() | theirs.keys()) - {"peft_version"}
    return sorted(key for key in keys if (wanted.get(key) or None) != (theirs.get(key) or None))


def _factors(data: bytes) -> Factors:
    factors = factors_of(load_tensors(data))
    for module, (a, c) in factors.items():
        if a.ndim != 2 or c.ndim != 2 or len(a) != c.shape[1] or 0 in (*a.shape, *c.shape):
            raise ValueError(f"{module} has factors of shape {tuple(a.shape)} and {tuple(c.shape)}")
        if a.dtype not in _FLOATS or c.dtype not in _FLOATS or not (a.isfinite().all() and c.isfinite().all()):
            raise ValueError(f"{module} has numbers that are not finite, or of an unusual type")
    if len({len(a) for a, _ in factors.values()}) > 1:
        raise ValueError("its modules have several ranks")
    return factors


def _reads_more(a: Tensor, increment: Increment) -> bool:
    """Tell whether rows (r, d_in) leave the row space of A at every door that is not wider than they are."""
    rows = a.double()
    known = [part.A.double() for part in (increment, *increment.doors.values()) if part.A.shape[1] <= a.shape[1]]
    return all(_outside(rows, pad(own, (0, a.shape[1] - own.shape[1]))) for own in known)


def _outside(rows: Tensor, own: Tensor) -> bool:
    directions = torch.linalg.qr(own.T).Q
    rest = rows - (rows @ directions) @ directions.T
    return bool((rest.norm(dim=1) > _ROUNDED * rows.norm(dim=1)).any())


def _apart(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], rounded: float) -> bool:
    """Tell whether two changes C A differ by more than rounding by this share makes of them."""
    (a, c), (own_a, own_c) = ((x.double(), y.double()) for x, y in (found, wanted))
    if a.shape[1] != own_a.shape[1] or len(c) != len(own_c):
        return True
    rows, columns = torch.cat([a, own_a]), torch.cat([c, -own_c], dim=1)
    # ‖Y X‖² = tr(YᵀY XXᵀ), by r numbers, not d.
    squared = float(((columns.T @ columns) * (rows @ rows.T)).sum())
    bound = rounded * float((own_c.norm(dim=0) * own_a.norm(dim=1)).sum())
    return not squared <= bound**2


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
