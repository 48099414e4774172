from dataclasses import replace

import pytest
import torch

from sepme_diffusers import Concept, SepMETrainer
from sepme_diffusers.algebra.closed_form import covariance
from sepme_diffusers.making.soft_guards import SoftGuards
from sepme_diffusers.text.encoding import encode, rows
from small import CLOSED, CONCEPTS

PROMPTS = ["a cat", "a dog", "a Neon fox", "catfish", "neon bus", "a picture of a pig", "a bus"]


@pytest.fixture
def soft(pipe) -> SoftGuards:
    return SoftGuards.from_prompts(pipe, PROMPTS)


def test_covariance_is_that_of_the_prompts(pipe, soft):
    torch.testing.assert_close(soft.covariance, covariance(rows(encode(pipe, PROMPTS))))


def test_prompts_that_name_the_concept_are_passed_over(pipe, soft):
    """What is left is the covariance of the others: 'neon' in any case, not words that merely contain the name."""
    others = ["a cat", "a dog", "catfish", "a picture of a pig", "a bus"]
    expected = covariance(rows(encode(pipe, others)))
    left = soft.without(pipe, Concept("neon", (("neon fox", "a fox"),)))
    torch.testing.assert_close(left, expected, rtol=1e-5, atol=1e-6)
    left = soft.without(pipe, Concept("cat", (("a bus", ""),)))
    expected = covariance(rows(encode(pipe, [p for p in PROMPTS if p not in ("a cat", "a bus")])))
    torch.testing.assert_close(left, expected, rtol=1e-5, atol=1e-6)


def test_a_prompt_file_becomes_a_small_file_that_comes_back(pipe, soft, tmp_path):
    (tmp_path / "regular.txt").write_text("\n".join([*PROMPTS, "", "a cat"]), encoding="utf-8")
    made = SoftGuards.from_file(pipe, tmp_path / "regular.txt")
    made.save(tmp_path / "regular.safetensors")
    assert (tmp_path / "regular.safetensors").stat().st_size < 8 * 384 * 385 / 2 + 1000
    back = SoftGuards.load(tmp_path / "regular.safetensors")
    assert back.prompts == tuple(PROMPTS)
    torch.testing.assert_close(back.covariance.double(), soft.covariance, rtol=1e-6, atol=1e-6)
    assert not list(tmp_path.glob(".*"))


def test_the_file_does_what_the_prompts_do(pipe, soft, tmp_path):
    """An increment made with the file is that made with the list of the other prompts."""
    soft.save(tmp_path / "soft.safetensors")
    config = replace(CLOSED, soft_guard_weight=300.0)
    others = [prompt for prompt in PROMPTS if "neon" not in prompt.lower()]
    from_list, from_file = (
        SepMETrainer(pipe, config, regular=guards).erase([CONCEPTS[0]])["neon"].increment
        for guards in (covariance(rows(encode(pipe, others))), SoftGuards.load(tmp_path / "soft.safetensors"))
    )
    prompts = rows(encode(pipe, [*PROMPTS, *CONCEPTS[0].prompts]))
    moved = [prompts @ one.A.T @ one.B.T for one in (from_list, from_file)]
    assert (moved[0] - moved[1]).norm() < 1e-3 * moved[0].norm()


@pytest.mark.parametrize("content", [b"", b"{}", b"not soft guards at all"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors holds no soft guards"):
        SoftGuards.load(tmp_path / "x.safetensors")


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        SoftGuards.load(tmp_path / "nowhere.safetensors")


def test_bad_lists_are_refused(pipe, soft):
    with pytest.raises(TypeError, match="list of prompts"):
        SoftGuards.from_prompts(pipe, "a cat")
    with pytest.raises(TypeError, match="list of prompts"):
        SepMETrainer(pipe, CLOSED, regular="regular.safetensors")
    with pytest.raises(ValueError, match="at least one prompt"):
        SoftGuards.from_prompts(pipe, [])
    with pytest.raises(ValueError, match=r"symmetric.*\(2, 3\)"):
        SoftGuards(("a",), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="every soft guard prompt is about 'cat'"):
        SoftGuards.from_prompts(pipe, ["a cat"]).without(pipe, Concept("cat"))


def test_another_text_encoders_file_is_noticed(pipe, soft):
    """Taking out prompts that were never in it leaves what no prompts have: a negative square."""
    wrong = SoftGuards(soft.prompts, soft.covariance * 0.1)
    with pytest.raises(ValueError, match="another text encoder"):
        wrong.without(pipe, Concept("neon", (("neon fox", "a fox"),)))
