"""Make the banks that the package ships, ten styles and a hundred objects in closed form, and its soft guards.

python examples/pocket/banks.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import typer
from rich.progress import track

from sepme_diffusers import ConceptBank, SepMEConfig, SepMEPipeline, SepMETrainer, SoftGuards, pocket
from sepme_diffusers.pocket import concepts

STYLES = SepMEConfig.linear()
# Objects differ more from one another than styles do: less needs guarding, and four directions are enough.
OBJECTS = SepMEConfig.linear(rank=4, soft_guard_weight=30.0)


def styles(pipe: SepMEPipeline) -> ConceptBank:
    """Every banked style, guarded by the blank prompt, the watermark and the names of all the others."""
    bank = None
    for style in track(concepts.BANKED_STYLES, description="styles"):
        others = [name for name in concepts.BANKED_STYLES if name != style]
        soft = concepts.regular_for_styles(style)
        trainer = SepMETrainer(pipe, STYLES, concepts.GUARDS, soft, others)
        bank = trainer.erase([concepts.style_concept(style)], bank)
    return bank


def objects(pipe: SepMEPipeline) -> ConceptBank:
    """Every banked object, guarded by the blank prompt and the watermark; the other objects are soft guards."""
    names = concepts.BANKED_OBJECTS
    regular = SoftGuards.from_prompts(pipe, [prompt for name in names for prompt in concepts.regular_prompts(name)])
    trainer = SepMETrainer(pipe, OBJECTS, concepts.GUARDS, regular)
    bank = ConceptBank(trainer.base())
    for name in track(names, description="objects"):
        # Made alone: with the names of 99 others as hard guards no dimension would be left.
        bank = bank.with_entries(trainer.erase([concepts.object_concept(name)]).values())
    return bank


def main(target: Path = Path(pocket.__file__).parent / "banks") -> None:
    """Write target/styles, target/objects, and soft_guards.safetensors beside target."""
    pipe = SepMEPipeline.from_pretrained(pocket.path())
    for name, bank in (("styles", styles(pipe)), ("objects", objects(pipe))):
        named = replace(bank, base=replace(bank.base, name="sepme_diffusers/pocket"))
        named.save_pretrained(target / name, torch.float16, license="apache-2.0", adapters=False)
    SoftGuards.from_prompts(pipe, concepts.regular_for_anything()).save(target.parent / "soft_guards.safetensors")


if __name__ == "__main__":
    typer.run(main)
