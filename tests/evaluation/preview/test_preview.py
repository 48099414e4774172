"""What a preview finds, and the page and the picture that show it."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sepme_diffusers import Concept, UnknownConceptError
from sepme_diffusers.evaluation.preview import page
from sepme_diffusers.evaluation.preview.outcome import Row, Sheet
from sepme_diffusers.evaluation.preview.preview import MOST_CONCEPTS, Settings, chosen, preview
from sepme_diffusers.evaluation.preview.prompts import Asked
from small import random_pipeline, wide

FEW = Settings(prompts=2, steps=2, guidance=4.0)


class SeesEverything:
    name = "one <who> agrees"

    def __call__(self, pictures, prompts, withouts):
        assert all(prompt != without for prompt, without in zip(prompts, withouts, strict=True))
        return [0.75] * len(pictures)


@pytest.fixture(scope="module")
def bank(text_bank):
    """With a second name."""
    concept = Concept("neon", text_bank["neon"].concept.pairs, aliases=("glowing",))
    return text_bank.with_entries([replace(text_bank["neon"], concept=concept)])


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("preview")


@pytest.fixture(scope="module")
def found(bank, output):
    return preview(random_pipeline(), bank, output, ["neon", "cat"], FEW, SeesEverything())


def test_erasing_moves_own_prompts_and_restoring_brings_every_picture_back(found):
    neon = found.sheets[0]
    assert [sheet.concept for sheet in found.sheets] == ["neon", "cat"]
    assert neon.moved("own") == (2, 2)
    assert min(row.erased.largest for row in neon.rows if row.asked.sort == "own") > 5
    for sheet in found.sheets:
        assert sheet.restored == (len(sheet.rows), len(sheet.rows))


def test_a_judge_scores_what_names_something(found):
    scored = {row.asked.sort: row.scores for row in found.sheets[0].rows}
    assert scored["own"] == scored["alias"] == scored["neighbour"] == (0.75, 0.75, 0.75)
    assert scored["regular"] == ()
    assert found.sheets[0].judged == (0.75, 0.75)


def test_a_second_run_draws_nothing_and_finds_the_same(found, pipe, bank, output):
    files = {file: file.stat().st_mtime_ns for file in (output / "pictures").iterdir()}
    again = preview(pipe, bank, output, ["neon", "cat"], FEW, SeesEverything())
    assert page.page(again, "base") == page.page(found, "base")
    assert {file: file.stat().st_mtime_ns for file in (output / "pictures").iterdir()} == files
    assert pipe.erasable == ()


def test_another_seed_draws_other_pictures(found, pipe, bank, tmp_path):
    other = preview(pipe, bank, tmp_path, ["neon"], replace(FEW, seed=1, prompts=1)).sheets[0].rows[0]
    same = next(row for row in found.sheets[0].rows if row.asked == other.asked)
    assert not np.array_equal(other.pictures[0], same.pictures[0])


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(found):
    text = page.page(found, "me/<model>")
    assert set(re.findall(r'(?:src|href)="(.{2})', text)) == {"da", "#c"}
    assert "<script" not in text
    assert text.count("<img ") == 3 * sum(len(sheet.rows) for sheet in found.sheets)
    assert "me/&lt;model&gt;" in text
    assert "one &lt;who&gt; agrees" in text


def row(sort: str, erased: int, restored: int) -> Row:
    pictures = [Image.new("RGB", (8, 8), (9, 9, value)) for value in (100, 100 + erased, 100 + restored)]
    return Row.of(Asked(sort, sort), pictures, None)


@pytest.mark.parametrize(
    ("sort", "erased", "restored", "wanted"),
    [
        ("own", 20, 0, (True, True)),
        ("alias", 0, 0, (False, True)),
        ("neighbour", 1, 0, (False, True)),
        ("regular", 0, 0, (True, True)),
        ("regular", 0, 1, (True, False)),
    ],
)
def test_green_is_what_should_be_and_red_what_should_not(sort, erased, restored, wanted, found):
    shown = row(sort, erased, restored)
    assert (shown.as_wanted, shown.restored.none) == wanted
    colours = [
        tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        for colour in (page._GREEN if good else page._RED for good in wanted)
    ]
    sheet = np.asarray(page.grid(replace(found, sheets=(Sheet("x", (shown,)),))))
    middle = sheet[sheet.shape[0] // 2]
    frames = [index for index, pixel in enumerate(middle) if tuple(pixel) in {*colours}]
    assert tuple(middle[frames[0]]) == colours[0]
    assert tuple(middle[frames[-1]]) == colours[1]


def test_a_black_picture_is_never_as_it_should_be():
    black = [Image.new("RGB", (8, 8))] * 3
    assert not Row.of(Asked("regular", "a cat"), black, None).as_wanted


def test_the_first_concepts_are_shown_unless_some_are_named(text_bank):
    bank = wide(text_bank, 4)
    assert chosen(bank, None) == tuple(bank)[:MOST_CONCEPTS]
    assert chosen(bank, ["cat 3"]) == ("cat 3",)
    with pytest.raises(UnknownConceptError, match="Did you mean"):
        chosen(bank, ["cat 33"])
    with pytest.raises(ValueError, match="has no concepts"):
        chosen(bank.subset([]), None)


def test_what_a_policy_always_erases_is_shown_restored_too(pipe, text_bank, tmp_path):
    found = preview(pipe, replace(text_bank, always=("cat",)), tmp_path, ["neon"], replace(FEW, prompts=1))
    assert found.sheets[0].restored[0] == len(found.sheets[0].rows)


def test_a_pipeline_with_a_bank_is_refused(pipe, text_bank, tmp_path):
    pipe.load_sepme(text_bank)
    with pytest.raises(ValueError, match="unload_sepme"):
        preview(pipe, text_bank, tmp_path)
