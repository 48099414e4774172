"""Pictures are kept under what decides them."""

import numpy as np
import pytest
import torch
from PIL import Image

from sepme_diffusers.evaluation.preview.kept import KeptPictures, base_facts, folder_for_pictures
from small import random_pipeline


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, value, value))


def refuse() -> Image.Image:
    raise AssertionError("drawn though it is kept")


def test_a_picture_is_drawn_once_for_what_decides_it(tmp_path):
    kept = KeptPictures(tmp_path, {"seed": 0})
    kept.get({"prompt": "a cat"}, lambda: flat(1))
    assert np.array_equal(kept.get({"prompt": "a cat"}, refuse), flat(1))
    other_prompt = kept.get({"prompt": "a dog"}, lambda: flat(2))
    other_seed = KeptPictures(tmp_path, {"seed": 1}).get({"prompt": "a cat"}, lambda: flat(3))
    assert [picture.getpixel((0, 0))[0] for picture in (other_prompt, other_seed)] == [2, 3]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_file_is_drawn_anew(tmp_path):
    kept = KeptPictures(tmp_path, {})
    kept.get({"prompt": "a cat"}, lambda: flat(1))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    assert kept.get({"prompt": "a cat"}, lambda: flat(2)).getpixel((0, 0))[0] == 2
    assert np.array_equal(kept.get({"prompt": "a cat"}, refuse), flat(2))


def test_equal_pipelines_have_equal_facts_and_whatever_draws_otherwise_has_others(pipe):
    facts = base_facts(pipe)
    assert base_facts(random_pipeline()) == facts
    assert base_facts(random_pipeline(seed=1))["weights"] != facts["weights"]
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(0.1)
    assert base_facts(pipe)["weights"] != facts["weights"]
    half = random_pipeline().to(dtype=torch.bfloat16)
    assert base_facts(half)["dtype"] == "torch.bfloat16"
    other = random_pipeline()
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, timestep_spacing="trailing")
    assert base_facts(other)["scheduler"] != facts["scheduler"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write into .*file.*choose another output folder"):
        folder_for_pictures(tmp_path / "file")
    assert folder_for_pictures(tmp_path / "new" / "folder").is_dir()
