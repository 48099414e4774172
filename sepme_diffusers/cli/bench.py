"""`sepme bench`: speed and memory against stated baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sepme_diffusers.cli.console import as_rich, console, quieten, refusals

if TYPE_CHECKING:
    from sepme_diffusers.evaluation.bench.registry import Row

_PRECISIONS = ("float32", "float16", "bfloat16")


def bench(
    device: Annotated[str, typer.Option(help="Where: cpu, cuda, mps ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of timings for each ratio.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps per timing; 20 on a GPU, as calls have.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="One measure; may be given several times.")] = None,
) -> None:
    """Measure speed and memory, as ratios against a stated baseline. On two cores all of it takes about an hour."""
    quieten()
    import torch

    from sepme_diffusers.evaluation.bench import registry
    from sepme_diffusers.evaluation.bench.runner import Runner

    if dtype not in _PRECISIONS:
        raise typer.BadParameter(f"no precision {dtype!r}; choose one of {', '.join(_PRECISIONS)}")
    runner = Runner(device, getattr(torch, dtype), repeats, steps)
    rows: list[Row] = []
    with console.status("...") as status:
        with refusals():
            results = registry.run(runner, only or (), status.update)
        try:
            rows.extend(results)
        finally:
            # Also what was measured before a measure that failed: an hour's work is not lost.
            if rows:
                console.print(as_rich(registry.table(runner, rows)))
