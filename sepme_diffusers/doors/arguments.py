"""The text arguments of a pass: read from positional and keyword arguments, and replaced without changing either."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from sepme_diffusers.doors.family import Door, Family

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class DoorArguments:
    """Where the doors of a denoiser's family stand in the signature of its forward.

    Args:
        denoiser: The denoiser.
        family: Its family.

    Raises:
        TypeError: If its forward lacks the argument of a door that is not optional, or the one with the pictures.
    """

    def __init__(self, denoiser: nn.Module, family: Family) -> None:
        names = [name for name in inspect.signature(type(denoiser).forward).parameters if name != "self"]
        wanted = [family.sample, *(door.argument.split(".")[0] for door in family.doors if not door.optional)]
        if missing := [name for name in wanted if name not in names]:
            raise TypeError(
                f"the forward of {type(denoiser).__name__} has no argument {missing}, by which family {family.name!r} "
                f"says that text enters; it has {names}"
            )
        self._family = family
        self._places = {name: index for index, name in enumerate(names)}

    def pictures(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return how many pictures the pass works on: the rows of the sample."""
        return len(self._get(self._family.sample, args, kwargs))

    def embeddings(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Return the text embeddings that a pass brings, by door."""
        embeddings = {door.name: self._embedding(door, args, kwargs) for door in self._family.doors}
        return {name: embedding for name, embedding in embeddings.items() if embedding is not None}

    def replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any], edited: dict[str, Tensor]) -> Arguments:
        """Return the arguments with other embeddings at these doors; dictionaries inside are copied, not changed."""
        kwargs = dict(kwargs)
        for door in self._family.doors:
            if door.name not in edited:
                continue
            name, _, key = door.argument.partition(".")
            value = {**self._get(name, args, kwargs), key: edited[door.name]} if key else edited[door.name]
            place = self._places[name]
            if place < len(args):
                args = (*args[:place], value, *args[place + 1 :])
            else:
                kwargs[name] = value
        return args, kwargs

    def _embedding(self, door: Door, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        name, _, key = door.argument.partition(".")
        value = self._get(name, args, kwargs)
        if key:
            return value.get(key) if value is not None else None
        return value

    def _get(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self._places.get(name)
        if place is not None and place < len(args):
            return args[place]
        return kwargs.get(name)
