"""The paper's four scenes: of nine concepts c0 ... c8, which are erased when. Three of them, c6 to c8, are regular.

Scene 3 is played in three ways: the paper's, where increments do not guard the regular concepts; with these guarded by
name, as in the other scenes; and so that the earlier increments are decoupled from every concept that has joined.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scene:
    """Who is erased when, and how the increments are made.

    Args:
        erased: What is erased at each moment, by index.
        joining: Whether an increment is made when its concept is first erased; else all are made at once.
        guarded: Whether every increment guards the names of the regular concepts.
        decoupled: Whether the earlier increments are decoupled from those that have joined.
    """

    erased: tuple[tuple[int, ...], ...]
    joining: bool = False
    guarded: bool = True
    decoupled: bool = False


_THIRD = ((0, 2, 4), (4,), (1, 3, 4), (3, 4), (3, 4, 5), ())
# The paper's sets; every scene ends with everything restored, which is ours.
SCENES: dict[str, Scene] = {
    "1": Scene(((0, 1, 2, 3, 4, 5), (2, 3, 4, 5), (3, 4, 5), ())),
    "2": Scene(((0, 1, 2, 3, 4, 5), (0, 1, 2, 5), (0, 1, 2), ())),
    "3": Scene(_THIRD, joining=True, guarded=False),
    "3-guarded": Scene(_THIRD, joining=True),
    "3-decoupled": Scene(_THIRD, joining=True, decoupled=True),
    "4": Scene(((0, 1, 2), (1, 2), (1, 2, 3, 4), (2, 3, 4), (2, 3, 4, 5), (3, 4, 5), ()), joining=True),
}
