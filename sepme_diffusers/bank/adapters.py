"""Adapters: increments as PEFT LoRAs of one denoiser, for tools that know nothing of banks."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from sepme_diffusers.bank.entries import Entries
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.bank.fingerprint import Fingerprint
from sepme_diffusers.bank.rows import as_rows, digest
from sepme_diffusers.doors.linears import plain
from sepme_diffusers.doors.registry import door_linears, drawing_denoisers, text_weights
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.merging import in_half, merged
from sepme_diffusers.increment.peft_form import Factors, lora, peft_files

# What diffusers' own `get_logger` gives; importing that takes seconds, and reading a bank needs none of it.
logger = logging.getLogger(__name__)

MOST = 200
"""A bank of more concepts has no adapters unless they are asked for."""
_PIPELINE = "model_index.json"


class KnownDenoiser:
    """A denoiser that is known as long as something else holds it. Copied in memory only: a pickled one is forgotten.

    Args:
        module: The denoiser; default: none.
        name: What the base model is called that it is of.
    """

    def __init__(self, module: nn.Module | None = None, name: str = "") -> None:
        self._module = None if module is None else weakref.ref(module)
        self.name = name

    @classmethod
    def of(cls, base: Any) -> KnownDenoiser:
        """Take the denoiser of a pipeline, or a denoiser itself.

        Raises:
            ValueError: If the pipeline has several.
            TypeError: If it has none.
        """
        if isinstance(base, nn.Module):
            return cls(plain(base), base_name(plain(base)))
        denoisers = drawing_denoisers(base)
        if len(denoisers) > 1:
            raise ValueError(f"the pipeline has the denoisers {list(denoisers)}; give the one that adapters are for")
        return cls(next(iter(denoisers.values())), base_name(base))

    @property
    def module(self) -> nn.Module | None:
        """The denoiser, or None if it is gone."""
        return None if self._module is None else self._module()

    def __reduce__(self) -> tuple[Any, ...]:
        return KnownDenoiser, ()


def base_name(model: Any) -> str:
    """Name the base model of a pipeline or of a denoiser: its id, or the name of its folder."""
    name = str(model.config.get("_name_or_path") or type(model).__name__)
    folder = Path(name)
    if not folder.is_dir():
        return name
    # Whoever gets the bank has no use for a path of this machine, nor for the name of a folder within a pipeline's.
    return (folder.parent if (folder.parent / _PIPELINE).exists() else folder).name


class Adapters:
    """Makes adapters: what increments change in the weights of one denoiser.

    Args:
        base: The bank's.
        denoiser: Only read.
        name: What the base model is called that the denoiser is of. If its weights are known to be those of the bank's
            base, it has that one's name.

    Raises:
        ValueError: If no increment of the bank can be written as a change of the denoiser's weights: it is of another
            width, or its family names no Linears that read the text and nothing else.
    """

    def __init__(self, base: BaseModel, denoiser: nn.Module, name: str) -> None:
        self.weights, self.linears = text_weights(denoiser), door_linears(denoiser)
        if wrong := {d for weight in self.weights.values() if (d := weight.shape[1]) != base.width}:
            raise ValueError(
                f"adapters cannot be made for {name!r}, which is another base: embeddings are {base.width} wide in "
                f"the bank, and {sorted(wrong)} there"
            )
        self.name = name
        if base.projections is not None:
            other = base.fingerprint.differs(Fingerprint.of_weights(self.weights))
            self.name = base.name if not other else f"{name} (other weights)" if name == base.name else name

    def factors(self, increment: Increment) -> Factors:
        """Give an increment as the factors of its adapter, in float16, by module name.

        Raises:
            ValueError: If it does not fit the weights, acts at a door that no Linear reads, or is too large.
        """
        return in_half(merged([(increment, 1.0)], self.weights, self.linears))

    def adapter(self, entry: Entry, increment: Increment) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Make an entry's adapter: the files of its folder, and what the record says of it beside.

        Args:
            entry: The entry. If it has an increment for its adapter, that one is taken.
            increment: Its increment as it is stored.

        Raises:
            ValueError: See `factors`.
        """
        source = increment if entry.adapter is None else entry.adapter
        files = peft_files(*lora(self.factors(source)))
        said = {"base": self.name, "of": digest(as_rows(source))}
        leakage = entry.metrics.get("adapter_leakage")
        return files, said | ({} if leakage is None else {"leakage": leakage})


def choose(
    base: BaseModel, entries: Entries, known: KnownDenoiser | None, wanted: bool | None, given: Any
) -> tuple[bool, Adapters | None]:
    """Decide whether a bank has adapters, and what makes those that are not there.

    Args:
        base: The bank's.
        entries: The bank's.
        known: The denoiser that the bank remembers.
        wanted: True, False, or None for what a bank has by default.
        given: A pipeline or a denoiser to make them for. Default: the one that the bank remembers.

    Returns:
        Whether there are adapters, and their maker if the denoiser is known and some are needed.

    Raises:
        ValueError: If adapters are wanted and no denoiser is known, or they cannot be made for the one that was given.
        TypeError: If a pipeline without a denoiser is given.
    """
    if wanted is False:
        return False, None
    if wanted is None and len(entries) > MOST:
        had = any("adapter" in part.record for name in entries if (part := entries.stored(name)) is not None)
        logger.log(
            logging.WARNING if had else logging.INFO,
            "no adapters for PEFT: the bank has %d concepts, and more than %d get none unless adapters=True",
            len(entries),
            MOST,
        )
        return False, None
    denoiser = known if given is None else KnownDenoiser.of(given)
    module = None if denoiser is None else denoiser.module
    if denoiser is None or module is None:
        if wanted:
            raise ValueError("adapters=True needs a denoiser's weights: give base=, a pipeline or its denoiser")
        logger.info("no adapters for PEFT are made: no denoiser is known; base= names one")
        return True, None
    try:
        return True, Adapters(base, module, denoiser.name)
    except ValueError as error:
        if wanted or given is not None:
            raise
        logger.warning("no adapters for PEFT are made: %s", error)
        return True, None
