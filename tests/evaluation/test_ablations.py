"""Ablations: each point is made as it says, and what theory says of reach and size is seen."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from sepme_diffusers.cli.app import app
from sepme_diffusers.evaluation.protocols.ablations import ABLATIONS, Ablator, plot, table
from sepme_diffusers.evaluation.protocols.variant_runner import VariantRunner
from sepme_diffusers.evaluation.protocols.variants import STYLES
from sepme_diffusers.increment.config import SepMEConfig


@pytest.fixture(scope="module")
def ablator(pocket_pipe):
    return Ablator(pocket_pipe, VariantRunner(pocket_pipe, 0, pictures=1, steps=1))


def test_every_choice_is_a_setting():
    for points in ABLATIONS.values():
        for choice in points.values():
            SepMEConfig.linear(**choice.settings)


def test_more_guards_leave_less_reach(ablator):
    """Every exact guard takes dimensions away from the increment."""
    points = [ablator.measure("guarded names", value) for value in ("0", "8", "16")]
    assert points[0].reach > points[1].reach > points[2].reach > 0
    shown = table(points)
    assert [row[:2] for row in shown.rows] == [("guarded names", value) for value in ("0", "8", "16")]
    picture = plot(points)
    assert picture.size[1] > 400
    assert len(set(picture.resize((40, 40)).getdata())) > 5


def test_guards_that_are_more_alike_take_more_of_the_concept(ablator):
    least, most = (ablator.measure("likeness of the guards", value) for value in ("least", "most"))
    assert least.reach > most.reach
    assert not set(ablator.names("least")[:8]) & set(ablator.names("most")[:8])
    assert sorted(ablator.names("most")) == sorted(ablator.names("any"))
    assert not set(STYLES) & set(ablator.names("any"))


def test_a_report_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(ABLATIONS, "rank", {value: ABLATIONS["rank"][value] for value in ("1", "16")})
    options = ["--only", "rank", "--pictures", "1", "--steps", "1", "--output", str(tmp_path)]
    shown = CliRunner().invoke(app, ["eval", "ablations", *options])
    assert shown.exit_code == 0, shown.output
    ((one, many),) = json.loads((tmp_path / "ablations.json").read_text("utf-8")).values()
    assert (one["varied"], one["value"], many["value"]) == ("rank", "1", "16")
    assert float(many["‖ΔW‖"]) >= float(one["‖ΔW‖"])
    assert Image.open(tmp_path / "ablations.png").size[0] > 100
    assert "ablations.png" in (tmp_path / "ablations.md").read_text("utf-8")


def test_unknown_ablations_are_refused_with_what_there_is():
    shown = CliRunner().invoke(app, ["eval", "ablations", "--only", "colour"])
    assert shown.exit_code == 2
    assert "rank" in shown.output
