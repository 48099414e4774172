"""Separable concept erasure for diffusers: erase, restore and compose, exactly (SepME, arXiv 2402.05947)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sepme_diffusers.bank import BaseModel, ConceptBank, Entry, Guarantee
    from sepme_diffusers.card import Picture, card_pictures
    from sepme_diffusers.concepts import Concept
    from sepme_diffusers.config import SepMEConfig
    from sepme_diffusers.export import export_adapters, export_checkpoint, export_lora
    from sepme_diffusers.hooks import ErasureNotInForce
    from sepme_diffusers.hub import PushConflict
    from sepme_diffusers.increment import Increment
    from sepme_diffusers.manifest import BankError
    from sepme_diffusers.pipeline import SepMELoaderMixin, SepMEPipeline, SepMEXLPipeline, attach
    from sepme_diffusers.training import SepMETrainer, Step

# Imported when first used, so that the command line answers before torch is loaded.
_WHERE = {
    "BankError": "manifest",
    "BaseModel": "bank",
    "ConceptBank": "bank",
    "Entry": "bank",
    "Guarantee": "bank",
    "export_adapters": "export",
    "export_checkpoint": "export",
    "export_lora": "export",
    "Picture": "card",
    "card_pictures": "card",
    "Concept": "concepts",
    "SepMEConfig": "config",
    "ErasureNotInForce": "hooks",
    "PushConflict": "hub",
    "Increment": "increment",
    "SepMELoaderMixin": "pipeline",
    "SepMEPipeline": "pipeline",
    "SepMEXLPipeline": "pipeline",
    "attach": "pipeline",
    "SepMETrainer": "training",
    "Step": "optimise",
    "SoftGuards": "soft_guards",
    "Capacity": "guards",
}

__all__ = [
    "BankError",
    "BaseModel",
    "Capacity",
    "Concept",
    "ConceptBank",
    "Entry",
    "ErasureNotInForce",
    "Guarantee",
    "Increment",
    "Picture",
    "PushConflict",
    "SepMEConfig",
    "SepMELoaderMixin",
    "SepMEPipeline",
    "SepMETrainer",
    "SepMEXLPipeline",
    "SoftGuards",
    "Step",
    "attach",
    "card_pictures",
    "export_adapters",
    "export_checkpoint",
    "export_lora",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"sepme_diffusers.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'sepme_diffusers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
