"""Make the banks that the package ships, ten styles and a hundred objects, from their names.

python examples/pocket/banks.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import typer

from sepme_diffusers import SepMEPipeline, SepMETrainer, pocket
from sepme_diffusers.pocket import vocabulary as words


def main(target: Path = Path(pocket.__file__).parent / "banks") -> None:
    """Write target/styles and target/objects."""
    trainer = SepMETrainer(SepMEPipeline.from_pretrained(pocket.path()), guards=[words.WATERMARK])
    for kind, names in (("style", words.BANKED_STYLES), ("object", words.BANKED_OBJECTS)):
        bank = trainer.erase(names, kind=kind)
        named = replace(bank, base=replace(bank.base, name="sepme_diffusers/pocket"))
        named.save_pretrained(target / f"{kind}s", torch.float16, license="apache-2.0", adapters=False)


if __name__ == "__main__":
    typer.run(main)
