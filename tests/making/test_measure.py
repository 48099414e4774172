"""What leaks, measured batch by batch: the same as measured one by one."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import Increment
from sepme_diffusers.increment.leakage import leakage
from sepme_diffusers.making.measure import LeakageMeter

NAMES = [f"name {index}" for index in range(40)]


def embeddings(count=40):
    draw = torch.Generator().manual_seed(5)
    return {"tokens": torch.randn(count, 7, 12, generator=draw), "pooled": torch.randn(count, 1, 5, generator=draw)}


def increments():
    """Of several ranks; with and without gates, further doors and half precision; and one per-module."""
    torch.manual_seed(0)

    def text(rank, d=12, **more):
        return Increment(torch.randn(rank, d), B=torch.randn(d, rank), **more)

    tokens = embeddings()["tokens"]
    made = [text(1), text(1), text(3), text(2), text(1).compact(), text(2).compact(), text(3).gated(tokens[:9], 1.6)]
    made += [replace(text(1), doors={"pooled": text(2, 5)}), text(1).gated(tokens, 2.0).compact()]
    made += [replace(text(1).gated(tokens, 3.0), doors={"pooled": text(1, 5, gate=1.5)})]
    made += [Increment(torch.randn(2, 12), C={"k": torch.randn(6, 2)})]
    return {f"name {index}": increment for index, increment in enumerate(made)}


WEIGHTS = {"k": torch.randn(6, 12, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("damped", [False, True])
def test_batches_give_what_each_increment_gives_alone(damped):
    meter, given = LeakageMeter(increments(), WEIGHTS, NAMES if damped else ()), embeddings()
    for start in range(0, 40, 9):
        part = {door: all_of[start : start + 9] for door, all_of in given.items()}
        meter.update(NAMES[start : start + 9], part)
    for name, increment in increments().items():
        leaks = dict(zip(NAMES, leakage(increment, given["tokens"], WEIGHTS, further=given).tolist(), strict=True))
        del leaks[name]
        ordered = sorted(leaks, key=leaks.get, reverse=True)
        expected = {guard: leaks[guard] for guard in (ordered[:10] if damped else ordered) if leaks[guard] > 0}
        metrics = meter.metrics(name)
        assert metrics["leakage"] == pytest.approx(max(leaks.values()), rel=6e-3)
        assert metrics.get("leakage_of", {}) == pytest.approx(expected, rel=6e-3)
        rest = leaks[ordered[10]] if damped else 0.0
        assert metrics.get("leakage_rest", 0.0) == pytest.approx(rest, rel=6e-3)
    gated = [meter.metrics(f"name {index}")["leakage"] for index in (6, 8, 9)]
    assert max(gated) > 0


def test_a_shut_gate_leaks_nothing():
    shut = {"a": replace(increments()["name 0"], gate=1e3)}
    meter = LeakageMeter(shut, damped=NAMES)
    meter.update(NAMES, embeddings())
    reading = shut["a"].reading(embeddings()["tokens"])
    assert meter.metrics("a") == {"leakage": 0.0, "gate_share": pytest.approx(float(reading.max()) / 1e3, abs=6e-4)}


@pytest.mark.parametrize("form", ["text", "module"])
def test_what_is_read_of_a_shut_gate_is_that_of_the_prompts_that_leave_it_shut(form):
    """Only of damped guards, never of the own name, and at whichever door it is most."""
    given, all_of = embeddings(), increments()
    made = all_of["name 9" if form == "text" else "name 10"]
    doors = {"tokens": made, **made.doors} if form == "text" else {"tokens": made}
    readings = {door: part.reading(given[door]) for door, part in doors.items()}
    gates = {door: float(reading.sort().values[20]) for door, reading in readings.items()}
    parts = {door: replace(part, gate=gates[door], doors={}) for door, part in doors.items()}
    increment = replace(parts.pop("tokens"), doors=parts)
    meter = LeakageMeter({"name 3": increment}, WEIGHTS, NAMES[:30])
    meter.update(NAMES, given)
    shares = [
        float(readings[door][index]) / gates[door]
        for door in readings
        for index in range(30)
        if index != 3 and float(readings[door][index]) <= 0.9 * gates[door]
    ]
    assert 0.3 < meter.metrics("name 3")["gate_share"] == pytest.approx(max(shares), abs=6e-4)
