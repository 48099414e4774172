"""Separable concept erasure for diffusers: erase, restore and compose, exactly (SepME, arXiv 2402.05947)."""

from sepme_diffusers.bank import BankError, BaseModel, ConceptBank, Entry
from sepme_diffusers.concepts import Concept
from sepme_diffusers.config import SepMEConfig
from sepme_diffusers.hooks import ErasureNotInForce
from sepme_diffusers.increment import Increment
from sepme_diffusers.pipeline import SepMELoaderMixin, SepMEPipeline
from sepme_diffusers.training import SepMETrainer, Step

__all__ = [
    "BankError",
    "BaseModel",
    "Concept",
    "ConceptBank",
    "Entry",
    "ErasureNotInForce",
    "Increment",
    "SepMEConfig",
    "SepMELoaderMixin",
    "SepMEPipeline",
    "SepMETrainer",
    "Step",
]
