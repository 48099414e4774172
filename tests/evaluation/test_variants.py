"""Variants of the method, from the command line to a table."""

import json

import pytest
from typer.testing import CliRunner

from sepme_diffusers import pocket
from sepme_diffusers.cli.app import app
from sepme_diffusers.evaluation.measures.registry import MEASURES
from sepme_diffusers.evaluation.protocols.variant_runner import Row, transfer_bars
from sepme_diffusers.evaluation.protocols.variants import STYLES, VARIANTS, Edit, VariantMaker


def test_the_papers_representation_is_against_the_blank_prompt_with_the_same_anchors(pocket_pipe, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "sepme_diffusers.making.trainer.SepMETrainer.erase",
        lambda self, concepts: seen.extend(concepts) or pocket.bank("styles"),
    )
    maker = VariantMaker(pocket_pipe)
    VARIANTS["aligned basis, against the blank prompt"](maker)
    assert [concept.name for concept in seen] == list(STYLES)
    for concept, own in zip(seen, maker.concepts, strict=True):
        assert concept.prompts == own.prompts
        assert {without for _, without in concept.pairs} == {""}
        assert concept.anchors == own.anchors


def test_size_is_that_of_the_files():
    bank = pocket.bank("styles").subset(STYLES)
    numbers = sum(tensor.numel() for entry in bank.values() for tensor in entry.increment.tensors().values())
    assert Edit(bank).kilobytes == pytest.approx(4 * numbers / 1e3, rel=0.05)


def test_variants_are_measured_beside_the_original(tmp_path):
    options = ["--only", "the default", "--only", "UCE", "--pictures", "1", "--steps", "1", "--output", str(tmp_path)]
    shown = CliRunner().invoke(app, ["eval", "variants", *options])
    assert shown.exit_code == 0, shown.output
    rows, measures = json.loads((tmp_path / "variants.json").read_text("utf-8")).values()
    original, closed, fused = rows
    assert [row["variant"] for row in rows] == ["original", "the default", "UCE"]
    assert original["guarded: max, /255"] == closed["guarded: max, /255"] == "0"
    assert int(fused["guarded: max, /255"]) > 0
    assert float(closed["KB"]) < float(fused["KB"])
    assert [(row["variant"], row["group"]) for row in measures][:2] == [
        ("original", "erased"),
        ("original", "regular"),
    ]
    assert set(measures[0]) == {"variant", "group", *MEASURES}


def test_unknown_variants_are_refused_with_what_there_is():
    shown = CliRunner().invoke(app, ["eval", "variants", "--only", "best"])
    assert shown.exit_code == 2
    assert "closed form, then trained" in shown.output


def test_another_unet_may_be_two_points_worse():
    def row(erased: float, regular: float) -> Row:
        return Row("", {"erased": {"style ACC %": erased}, "regular": {"style ACC %": regular}})

    first = (row(100, 100), row(4, 98))
    assert [bar.met for bar in transfer_bars({"base": first, "variant": (row(100, 100), row(6, 96))})] == [True, True]
    assert [bar.met for bar in transfer_bars({"base": first, "variant": (row(100, 100), row(7, 95))})] == [False] * 2
