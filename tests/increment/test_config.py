import json
import pickle
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest

from sepme_diffusers import SepMEConfig


def test_paper_has_the_papers_constants():
    config = SepMEConfig.paper()
    assert (config.learning_rate, config.momentum, config.beta) == (0.1, 0.9, 1e-4)
    assert (config.sparsity, config.tolerance, config.relative) == (1e-6, 1e-4, False)
    assert (config.min_steps, config.max_steps, config.basis) == (12, 1000, "full")
    assert (config.batch_size, config.steps_per_batch) == (1, 1)
    assert (config.n_images, config.image_steps, config.guidance_scale) == (1000, 100, 7.5)


def test_paper_takes_changes():
    assert SepMEConfig.paper(max_steps=20).max_steps == 20


def test_every_fault_is_named_at_once():
    with pytest.raises(ValueError, match="3 validation errors for SepMEConfig") as error:
        SepMEConfig(solver="guess", rank=0, momentum=1.0)
    for field, valid, given in (("solver", "'train', 'closed_form'", "guess"), ("rank", "greater than 0", "0"),
                                ("momentum", "less than 1", "1.0")):  # fmt: skip
        assert re.search(rf"{field}\n.*{re.escape(valid)}.*{given}", str(error.value)), field


@pytest.mark.parametrize(
    "fault",
    [
        {"beta": float("nan")}, {"learning_rate": float("inf")}, {"sparsity": -1}, {"min_steps": 9, "max_steps": 8},
        {"gain": 0}, {"gate": 1}, {"rank": 1.5}, {"rank": True}, {"rank": "16"}, {"seed": -1}, {"seed": 1.0},
        {"beta": "0.1"}, {"beta": True}, {"relative": 1}, {"reserve": 0}, {"solver": None},
    ],
)  # fmt: skip
def test_what_is_out_of_range_or_of_another_type_is_refused(fault):
    with pytest.raises(ValueError, match=next(iter(fault))):
        SepMEConfig(**fault)


def test_whole_numbers_are_numbers():
    config = SepMEConfig(guidance_scale=4, gain=1)
    assert (config.guidance_scale, config.gain) == (4.0, 1.0)


def test_it_is_an_immutable_value():
    config = SepMEConfig()
    with pytest.raises(FrozenInstanceError):
        config.rank = 3
    assert replace(config, rank=3) == SepMEConfig(rank=3)
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(SepMEConfig())
    with pytest.raises(ValueError, match="rank"):
        replace(config, rank=0)


def test_the_package_is_imported_without_its_libraries():
    code = "import sepme_diffusers, sys; print({'torch', 'pydantic', 'diffusers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"set()"


def test_round_trip_through_json():
    config = SepMEConfig(solver="closed_form", rank=5, seed=3)
    assert SepMEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_field_is_named():
    with pytest.raises(ValueError, match="'learning_speed'"):
        SepMEConfig.from_dict({"learning_speed": 1.0})


def test_a_setting_that_there_is_not_is_refused():
    """Passed over, it would leave its default in force."""
    for make in (SepMEConfig, SepMEConfig.paper, SepMEConfig.linear):
        with pytest.raises(ValueError, match="tolerence"):
            make(tolerence=0.1)
