"""Which families of denoisers are known, and where a pipeline has denoisers."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from sepme_diffusers.doors.controlnet import CONTROLNET
from sepme_diffusers.doors.family import Family
from sepme_diffusers.doors.unet import UNET

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family of denoisers known, so that pipelines with one of them can erase.

    Args:
        family: The family. A class name that another family has is taken over.

    Raises:
        ValueError: If the family has no denoiser or no door, or two doors of one name.

    Example:
        >>> from sepme_diffusers.doors.family import TOKENS, Door, Family
        >>> family = Family("mine", ("MyDenoiser",), (Door(TOKENS, "encoder_hidden_states"),), entry="proj_in")
        >>> register(family).name
        'mine'
    """
    names = [door.name for door in family.doors]
    if not family.denoisers or not names or len(set(names)) < len(names):
        raise ValueError(
            f"family {family.name!r} needs at least one class name and one door, and door names that differ; it has "
            f"denoisers {list(family.denoisers)} and doors {names}"
        )
    _FAMILIES.update(dict.fromkeys(family.denoisers, family))
    return family


for _built_in in (UNET, CONTROLNET):
    register(_built_in)


def family_of(module: nn.Module) -> Family | None:
    """The family of a denoiser, by its class or one that this is derived from; None for other modules."""
    return next((_FAMILIES[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in _FAMILIES), None)


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Every denoiser of a pipeline, by the name of its component: those that draw, then those that help them.

    A denoiser is found inside whatever wraps it (`torch.compile`, PEFT, a multi-ControlNet).

    Args:
        pipe: A diffusers pipeline.

    Raises:
        TypeError: If it has no denoiser that reads text, or one of which it is not known how.
    """
    found: dict[str, nn.Module] = {}
    for name, component in pipe.components.items():
        if not isinstance(component, nn.Module):
            continue
        inside = {path: module for path, module in component.named_modules() if family_of(module) is not None}
        if not inside and _reads_text(component):
            raise TypeError(
                f"{type(component).__name__} (component {name!r}) reads text by arguments that are not known: "
                f"{_arguments(component)}. Declare them with sepme_diffusers.doors.registry.register(Family(...)); "
                f"known are {sorted(_FAMILIES)}"
            )
        found |= {f"{name}.{path}" if path not in ("", "_orig_mod") else name: inside[path] for path in inside}
    main = {name: module for name, module in found.items() if not is_helper(module)}
    if not main:
        raise TypeError(
            f"{type(pipe).__name__} has no denoiser that reads text; SepME erases with {sorted(_FAMILIES)}"
        )
    return main | {name: module for name, module in found.items() if name not in main}


def is_helper(module: nn.Module) -> bool:
    """Whether a denoiser helps another one (a ControlNet) and draws nothing by itself."""
    return _family(module).auxiliary


def drawing_denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline that draw, by the name of their component; see `denoisers_of`."""
    return {name: module for name, module in denoisers_of(pipe).items() if not is_helper(module)}


def _family(module: nn.Module) -> Family:
    family = family_of(module)
    if family is None:
        raise TypeError(f"{type(module).__name__} is of no known family: {sorted(_FAMILIES)}")
    return family


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _reads_text(module: nn.Module) -> bool:
    """Whether a module looks like a denoiser that is told a text: it takes a timestep and a text embedding."""
    names = _arguments(module)
    return "timestep" in names and any(name.startswith(("encoder_hidden_states", "cap_feats")) for name in names)
