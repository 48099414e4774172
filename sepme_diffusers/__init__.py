"""Separable concept erasure for diffusers: erase, restore and compose, exactly (SepME, arXiv 2402.05947)."""

import lazy_loader

# The public names are those of `__init__.pyi`. Each is imported when it is first used, so that the command line
# answers before torch is loaded.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
