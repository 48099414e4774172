"""What the scenes measured, against its bars: tables, JSON values and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image

from sepme_diffusers.evaluation.probes import Kind
from sepme_diffusers.evaluation.protocols.scenes import (
    ERASED,
    GROUPS,
    GUARDED,
    PARAPHRASED,
    PLAIN,
    SECOND_NAME,
    UNSEEN,
    Exactness,
    Figures,
    Moment,
)
from sepme_diffusers.evaluation.report import Bar, Table
from sepme_diffusers.runtime.contact_sheet import contact_sheet

OTHER = {"styles": "object", "objects": "style"}
# Group, share of the original's accuracy that must be left in percent, and largest perceptual distance.
_KEPT = ((GUARDED, 99, None), (UNSEEN, 97, 0.05), (PLAIN, 97, 0.05))


def bars(kind: Kind, six: Moment, moments: Sequence[Moment]) -> list[Bar]:
    """Compare one kind with its bars: accuracies of six erased at once, and what must be exact at all moments.

    Args:
        kind: Of the concepts.
        six: The moment with six erased at once.
        moments: All that were played.
    """
    figures = six.figures
    compared = [_at_most(f"six erased {kind}: ACC %", figures[ERASED].acc, 10, 1)]
    compared.append(_kept(f"six erased {kind}: {OTHER[kind]} ACC, of the original's", figures[ERASED], 98, other=True))
    for group in (SECOND_NAME, PARAPHRASED):
        compared.append(_at_most(f"{kind} {group}: ACC %", figures[group].acc, 20, 1))
    for group, share, distance in _KEPT:
        if group in figures:
            other = group == PLAIN
            compared.append(_kept(f"{kind}, {group}: ACC, of the original's", figures[group], share, other))
            if distance is not None:
                compared.append(
                    _at_most(f"{kind}, {group}: perceptual distance", figures[group].distance, distance, 3)
                )
    return [*compared, *_exact(kind, [moment.exact for moment in (six, *moments)])]


def _at_most(measure: str, value: float, limit: float, digits: int) -> Bar:
    return Bar(measure, f"<= {limit}", f"{value:.{digits}f}", value <= limit)


def _kept(measure: str, figures: Figures, share: float, other: bool = False) -> Bar:
    now, before = (figures.kept, figures.original_kept) if other else (figures.acc, figures.original_acc)
    left = 100 * now / before if before else 0.0
    return Bar(measure, f">= {share} %", f"{left:.1f} % ({now:.1f} of {before:.1f})", left >= share)


def _exact(kind: Kind, moments: Sequence[Exactness]) -> list[Bar]:
    guards = max(exact.guards for exact in moments)
    names = max((change for exact in moments for change in exact.names.values()), default=0)
    alone = all(exact.alone for exact in moments)
    return [
        Bar(f"{kind}, blank prompt and watermark: largest change, /255", "<= 1", str(guards), guards <= 1),
        Bar(f"{kind}, guarded names, erased and restored ones too: largest change, /255", "0", str(names), not names),
        Bar(f"{kind}, restored: as if they had never been erased, to the bit", "yes", _yes(alone), alone),
    ]


def _yes(met: bool) -> str:
    return "yes" if met else "no"


_MEASURES: dict[str, Callable[[Figures], str]] = {
    "ACC %": lambda figures: f"{figures.acc:.1f} ({figures.original_acc:.1f})",
    "other ACC %": lambda figures: f"{figures.kept:.1f} ({figures.original_kept:.1f})",
    "FID": lambda figures: "" if figures.fid is None else f"{figures.fid:.1f}",
    "perceptual distance": lambda figures: f"{figures.distance:.3f}",
}


def table(kind: Kind, moments: Sequence[Moment]) -> Table:
    """Tabulate a scene: a row for each group and measure, a column for each moment; the original's in brackets."""
    rows = [
        (f"{group}: {name.replace('other', OTHER[kind])}", *(_figure(moment, group, show) for moment in moments))
        for group in GROUPS
        for name, show in _MEASURES.items()
        if any(group in moment.figures for moment in moments)
    ]
    rows = [row for row in rows if any(row[1:])]
    rows.append(
        ("blank prompt and watermark: largest change, /255", *(str(moment.exact.guards) for moment in moments))
    )
    rows.append(
        (
            "guarded names: largest change, /255",
            *(str(max(moment.exact.names.values(), default="")) for moment in moments),
        )
    )
    rows.append(("as if nothing else had ever been erased", *(_yes(moment.exact.alone) for moment in moments)))
    return Table("By moment", ("", *(", ".join(moment.erased) or "nothing" for moment in moments)), tuple(rows))


def _figure(moment: Moment, group: str, show: Callable[[Figures], str]) -> str:
    return show(moment.figures[group]) if group in moment.figures else ""


def sheet(original: dict[str, Image.Image], moments: Sequence[Moment]) -> Image.Image:
    """Lay out a row for each concept and for what no increment saw, a column for the original and for each moment."""
    rows = [[picture, *(moment.pictures[name] for moment in moments)] for name, picture in original.items()]
    labels = [name.replace(" ", "\n") if len(name) > 24 else name for name in original]
    headers = ["original", *(f"{len(moment.erased)} erased" for moment in moments)]
    return contact_sheet(rows, labels, headers, scale=2)


def values(moments: Sequence[Moment]) -> list[dict[str, Any]]:
    """Turn moments into plain JSON values."""
    return [
        {
            "erased": list(moment.erased),
            "groups": {group: asdict(figures) for group, figures in moment.figures.items()},
            "exact": asdict(moment.exact),
        }
        for moment in moments
    ]
