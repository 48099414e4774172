"""`pipe.compare`: the same noise under several erased sets, and nothing changed by it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from sepme_diffusers import Comparison, SepMEPipeline, UnknownConceptError

FEW = {"num_inference_steps": 2, "guidance_scale": 4.0}


@pytest.fixture
def loaded(pipe, text_bank) -> SepMEPipeline:
    pipe.load_sepme(text_bank)
    return pipe


def test_the_erased_column_moves_and_the_restored_one_is_equal(loaded):
    loaded.set_erased({"neon": 1.0, "cat": 0.5})
    comparison = loaded.compare(["a neon fox", "a dog"], seeds=[3, 4], **FEW)
    assert comparison.columns == ("nothing erased", "erased: neon, cat × 0.5", "restored")
    neon = comparison.changes[0]
    assert neon[0].none
    assert neon[1].largest > 5
    assert 0 < neon[1].mean < neon[1].largest
    assert [row[2].largest for row in comparison.changes] == [0, 0]
    assert loaded.erased == ("neon", "cat")


def test_each_column_is_what_a_call_with_that_set_draws(loaded):
    comparison = loaded.compare("a neon cat", sets=[["neon"], [], {"cat": 2}], seeds=7, **FEW)
    assert comparison.columns == ("erased: neon", "nothing erased", "erased: cat × 2")
    for erased, picture in zip((["neon"], [], {"cat": 2}), comparison.images[0], strict=True):
        generator = torch.Generator().manual_seed(7)
        alone = loaded("a neon cat", erased=erased, generator=generator, **FEW).images[0]
        assert np.array_equal(picture, alone)


def test_one_seed_is_that_of_every_prompt(loaded):
    twice, other = (loaded.compare(["a cat", "a cat"], [["neon"]], seeds, **FEW).images for seeds in (5, (5, 6)))
    assert np.array_equal(twice[0][0], twice[1][0])
    assert not np.array_equal(other[0][0], other[1][0])


def test_a_drawing_that_fails_leaves_the_standing_set(loaded):
    loaded.set_erased(["pencil"])
    columns = []

    def fail(pipe, step, timestep, kwargs):
        columns.append(step)
        if len(columns) > 2:  # in the second column
            raise RuntimeError("out of memory")
        return kwargs

    with pytest.raises(RuntimeError, match="out of memory"):
        loaded.compare("a cat", [[], ["neon"]], callback_on_step_end=fail, **FEW)
    assert loaded.erased == ("pencil",)
    assert loaded.compare("a cat", **FEW).columns[1] == "erased: pencil"


def test_what_is_always_erased_is_in_every_column(loaded):
    request = loaded.for_request(always=["cat"])
    comparison = request.compare("a neon fox", sets=[[], ["neon"]], **FEW)
    assert comparison.columns == ("erased: cat", "erased: neon, cat")


def test_a_sheet_has_every_picture_also_of_pictures_that_are_not_square(loaded):
    comparison = loaded.compare(["a neon fox", "a dog"], [[], ["neon"]], height=8, width=16, **FEW)
    assert comparison.images[0][0].size == (16, 8)
    sheet = comparison.sheet()
    assert sheet.width > 2 * 16 * 16
    colours = {colour for row in comparison.images for picture in row for _, colour in picture.getcolors()}
    assert colours <= {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert Image.open(io.BytesIO(comparison._repr_png_())).size == sheet.size


def test_a_notebook_shows_pictures_figures_and_escaped_prompts(loaded):
    html = loaded.compare("a <neon> fox", [[], ["neon"]], **FEW)._repr_html_()
    assert html.count('src="data:image/png;base64,') == 2
    assert "a &lt;neon&gt; fox" in html
    assert "<th>erased: neon</th>" in html
    assert "equal" in html


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "set_erased"),
        ({"sets": []}, ValueError, r"sets=\[\]"),
        ({"sets": ["neon"]}, TypeError, r"\['neon'\], not 'neon'"),
        ({"sets": "neon"}, TypeError, r"\['neon'\], not 'neon'"),
        ({"sets": [["neno"]]}, UnknownConceptError, "Did you mean 'neon'"),
        ({"sets": [[]], "seeds": [1, 2]}, ValueError, "2 seeds for 1 prompts"),
        ({"sets": [[]], "prompt": []}, ValueError, "needs a prompt"),
        ({"sets": [[]], "generator": None}, TypeError, "'generator': say the noise by seeds="),
        ({"sets": [[]], "output_type": "latent"}, TypeError, "'output_type': it is 'pil'"),
        ({"sets": [[]], "num_inference_stepz": 2}, TypeError, "num_inference_steps"),
    ],
)
def test_what_cannot_be_compared_is_refused(loaded, arguments, error, message):
    with pytest.raises(error, match=message):
        loaded.compare(**{"prompt": "a cat", **arguments})


def test_a_comparison_cannot_be_changed(loaded):
    comparison = loaded.compare("a cat", [[]], **FEW)
    assert isinstance(comparison, Comparison)
    with pytest.raises(AttributeError):
        comparison.prompts = ()
