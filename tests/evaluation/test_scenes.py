"""The scenes: who is erased, restored and regular when; and one of them, tiny, from the command line to its files."""

import json
from itertools import pairwise

import pytest
from PIL import Image
from typer.testing import CliRunner

from sepme_diffusers.cli.app import app
from sepme_diffusers.evaluation.protocols import scene_report, scenes
from sepme_diffusers.evaluation.protocols.scene_list import SCENES, Scene
from sepme_diffusers.evaluation.protocols.scenes import (
    CONCEPTS,
    NEVER_SEEN,
    REGULAR,
    Figures,
    cells,
    group,
)
from sepme_diffusers.pocket import vocabulary as words


def test_the_scenes_are_the_papers():
    """And each ends with everything restored."""
    papers = {
        "1": "012345 2345 345", "2": "012345 0125 012", "3": "024 4 134 34 345", "4": "012 12 1234 234 2345 345",
    }  # fmt: skip
    for name, sets in papers.items():
        erased = SCENES[name].erased
        assert [",".join(map(str, moment)) for moment in erased] == [*(",".join(text) for text in sets.split()), ""]
        assert set().union(*erased) == set(range(6))
        joins = any(set(later) - set(first) for first, later in pairwise(erased))
        assert joins == SCENES[name].joining
    # In the paper's third scene the regular concepts are in no increment's guards.
    assert [name for name, scene in SCENES.items() if not scene.guarded] == ["3"]
    assert {SCENES[name].erased for name in ("3", "3-guarded", "3-decoupled")} == {SCENES["3"].erased}
    assert SCENES["3-decoupled"].decoupled


@pytest.mark.parametrize("kind", ["styles", "objects"])
def test_nine_concepts_six_of_them_to_erase_and_others_that_no_bank_knows(kind):
    own = {"styles": words.STYLES, "objects": words.OBJECTS}[kind]
    assert len(set(CONCEPTS[kind])) == 9
    assert len(CONCEPTS[kind][REGULAR]) == 3
    assert set(CONCEPTS[kind]) <= set(own)
    assert not set(CONCEPTS[kind]) & set(NEVER_SEEN[kind])
    assert sum(own[name] is not None for name in CONCEPTS[kind][:6]) >= 5


def test_groups_follow_what_was_erased_and_when():
    names = CONCEPTS["styles"]
    own = {cell.concept: cell for cell in cells("styles", 2, 0) if not cell.role}

    def at(moment: int) -> list[str]:
        played = [[names[index] for index in indexes] for indexes in SCENES["4"].erased]
        earlier = [name for erased in played[:moment] for name in erased]
        return [group(own[name], played[moment], earlier, names[REGULAR]) for name in names]

    pending, guarded = "not yet erased", "regular, guarded"
    assert at(0) == ["erased"] * 3 + [pending] * 3 + [guarded] * 3
    assert at(3) == ["restored"] * 2 + ["erased"] * 3 + [pending] + [guarded] * 3
    assert at(6) == ["restored"] * 6 + [guarded] * 3


def test_other_words_count_only_while_their_concept_is_erased():
    roles = {cell.role for cell in cells("styles", 2, 0)} - {""}
    for cell in cells("styles", 2, 0):
        if cell.concept == "neon" and cell.role:
            assert group(cell, ["neon"], [], []) == cell.role
            assert group(cell, [], ["neon"], []) is None
    assert roles == set(scenes.GROUPS) - {
        "erased", "restored", "not yet erased", "regular, guarded", "regular, not guarded",
    }  # fmt: skip


def test_a_bar_that_is_missed_says_so():
    good = Figures(8, 0.0, 98.0, 100.0, 100.0, 0.5, 1.0)
    kept = Figures(8, 98.9, 100.0, 100.0, 100.0, 0.051, 1.0)
    figures = dict.fromkeys(scenes.GROUPS, kept) | {"erased": good, "erased, by its second name": good}
    six = scenes.Moment((), figures, scenes.Exactness(2, {"neon": 1}, False), {})
    found = {bar.measure: bar for bar in scene_report.bars("styles", six, [])}
    assert [bar.met for bar in list(found.values())[:4]] == [True, True, True, False]
    assert not found["styles, regular, guarded: ACC, of the original's"].met
    assert found["styles, regular, never seen: ACC, of the original's"].met
    assert not found["styles, regular, never seen: perceptual distance"].met
    assert [bar.met for bar in list(found.values())[-3:]] == [False] * 3


def test_unknown_scenes_are_refused_before_any_work():
    shown = CliRunner().invoke(app, ["eval", "scenes", "--only", "styles-5"])
    assert shown.exit_code == 2
    assert "styles-5" in shown.output
    assert "objects-4" in shown.output


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    options = ["--only", "styles-4", "--pictures", "2", "--steps", "1", "--output", str(folder)]
    short = pytest.MonkeyPatch()
    short.setitem(SCENES, "4", Scene(((0, 1), (1, 3), ()), joining=True))
    short.setitem(CONCEPTS, "styles", ("woodcut", "neon", "blueprint", "pencil", "stencil", "watercolour"))
    short.setattr(scenes, "REGULAR", slice(4, 6))
    short.setattr(scenes, "_FEW_STEPS", 1)
    short.setattr(scenes, "BAR_PICTURES", 1)
    shown = CliRunner().invoke(app, ["eval", "scenes", *options])
    short.undo()
    assert shown.exit_code == 0, shown.output
    return folder


def test_a_scene_writes_a_page_its_figures_and_a_picture(played):
    names = {"styles-scene-4.md", "styles-scene-4.json", "styles-scene-4.png", "bars.md", "bars.json"}
    assert names | {"styles-six-erased.md", "styles-six-erased.json"} == {file.name for file in played.iterdir()}
    page = (played / "styles-scene-4.md").read_text("utf-8")
    assert "| erased: ACC % |" in page
    assert "](styles-scene-4.png)" in page
    assert Image.open(played / "styles-scene-4.png").height > 9 * 128


def test_a_scene_restores_exactly_and_leaves_what_is_guarded_alone(played):
    scene = json.loads((played / "styles-scene-4.json").read_text("utf-8"))
    assert (scene["seed"], scene["pictures"], scene["steps"]) == (20_000, 2, 1)
    first, second, last = scene["moments"]
    assert second["erased"] == ["neon", "pencil"]
    assert set(second["groups"]) >= {"erased", "restored", "not yet erased", "regular, guarded", "regular, never seen"}
    assert first["groups"]["erased"]["distance"] > 10 * first["groups"]["regular, guarded"]["distance"]
    assert all(moment["exact"]["guards"] == 0 and moment["exact"]["alone"] for moment in scene["moments"])
    # What joined later is not known to the increments made before.
    assert "pencil" not in first["exact"]["names"]
    assert {"stencil", "watercolour"} <= set(second["exact"]["names"])
    assert not any(change for moment in scene["moments"] for change in moment["exact"]["names"].values())
    assert all(figures["distance"] == 0 and figures["fid"] < 1e-6 for figures in last["groups"].values())
    bars = json.loads((played / "bars.json").read_text("utf-8"))["Bars"]
    assert {row["met"] for row in bars} <= {"yes", "no"}
    assert bars[-1] == {
        "measure": "styles, restored: as if they had never been erased, to the bit",
        "bar": "yes", "measured": "yes", "met": "yes",
    }  # fmt: skip
