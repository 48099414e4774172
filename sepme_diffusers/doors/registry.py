"""Which families of denoisers are known, and where a pipeline has denoisers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from sepme_diffusers.doors.controlnet import CONTROLNET
from sepme_diffusers.doors.family import Family
from sepme_diffusers.doors.linears import linear_weight, other_text_readers
from sepme_diffusers.doors.unet import UNET

_FAMILIES: dict[str, Family] = {}
# Components that were looked through.
_without_denoiser: WeakSet[nn.Module] = WeakSet()


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
    _without_denoiser.clear()
    return family


for _built_in in (UNET, CONTROLNET):
    register(_built_in)


def family_of(module: nn.Module) -> Family | None:
    """Return the family of a denoiser, by its class or one that this is derived from; None for other modules."""
    return next((_FAMILIES[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in _FAMILIES), None)


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return every denoiser of a pipeline, by the name of its component: those that draw, then those that help them.

    A denoiser is found inside whatever wraps it (`torch.compile`, PEFT, a multi-ControlNet).

    Args:
        pipe: A diffusers pipeline.

    Raises:
        TypeError: If it has no denoiser that reads text, or one of which it is not known how.
    """
    denoisers: dict[str, nn.Module] = {}
    # Not `pipe.components`, which reads the signature of the class anew each time, and only knows registered ones.
    for name, component in vars(pipe).items():
        if not isinstance(component, nn.Module) or component in _without_denoiser:
            continue
        inside = dict(_denoisers_inside(component, name))
        if not inside:
            _refuse_unknown_reader(component, name)
            # Not looked through again: a pipeline asks before every call.
            _without_denoiser.add(component)
        known = {id(module) for module in denoisers.values()}
        denoisers |= {path: module for path, module in inside.items() if id(module) not in known}
    main = {name: module for name, module in denoisers.items() if not is_helper(module)}
    if not main:
        raise TypeError(
            f"{type(pipe).__name__} has no denoiser that reads text; SepME erases with {sorted(_FAMILIES)}"
        )
    return main | {name: module for name, module in denoisers.items() if name not in main}


def denoising_components(pipe: Any) -> list[nn.Module]:
    """Return the components of a pipeline that are denoisers or wrap one."""
    return [vars(pipe)[name] for name in dict.fromkeys(path.split(".")[0] for path in denoisers_of(pipe))]


def is_helper(module: nn.Module) -> bool:
    """Return whether a denoiser helps another one (a ControlNet) and draws nothing by itself."""
    return _family(module).auxiliary


def drawing_denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline that draw, by the name of their component; see `denoisers_of`."""
    return {name: module for name, module in denoisers_of(pipe).items() if not is_helper(module)}


def text_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """Return the weights (d_out, d) of the Linears that read the text and nothing else, by module name.

    Raises:
        ValueError: If the denoiser is of no known family, its family names none, or something else reads the text as
            well, so that changing these would be a part of an erasure.
    """
    kind, family = type(denoiser).__name__, family_of(denoiser)
    if family is None or family.linears is None:
        raise ValueError(f"no Linears of {kind} are known that read the text and nothing else")
    if others := other_text_readers(denoiser):
        raise ValueError(f"{kind} reads the text in other ways beside: {others}")
    return {name: linear_weight(module) for name, module in family.linears(denoiser).items()}


def door_linears(denoiser: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Return the Linears that read the embeddings of further doors, by door: the name and the weight (d_out, d_in).

    The embedding stands in the weight's first columns. Doors that no Linear of the denoiser reads are left out.
    """
    modules = dict(denoiser.named_modules())
    return {
        door.name: (door.linear, linear_weight(modules[door.linear]))
        for door in _family(denoiser).doors
        if door.linear is not None and door.linear in modules
    }


def _family(module: nn.Module) -> Family:
    family = family_of(module)
    if family is None:
        raise TypeError(f"{type(module).__name__} is of no known family: {sorted(_FAMILIES)}")
    return family


def _denoisers_inside(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The denoisers in a component: itself, or inside what wraps it. Parts of a denoiser are none."""
    if family_of(module) is not None:
        yield path, module
        return
    for name, child in module.named_children():
        yield from _denoisers_inside(child, path if name == "_orig_mod" else f"{path}.{name}")


def _refuse_unknown_reader(component: nn.Module, name: str) -> None:
    """Check that a component is no denoiser that is told a text: one takes a timestep and a text embedding."""
    arguments = list(inspect.signature(component.forward).parameters)
    if "timestep" in arguments and any(a.startswith(("encoder_hidden_states", "cap_feats")) for a in arguments):
        raise TypeError(
            f"{type(component).__name__} (component {name!r}) reads text by arguments that are not known: "
            f"{arguments}. Declare them with sepme_diffusers.doors.registry.register(Family(...)); known are "
            f"{sorted(_FAMILIES)}"
        )
