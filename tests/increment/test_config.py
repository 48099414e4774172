import json

import pytest

from sepme_diffusers import SepMEConfig


def test_paper_has_the_papers_constants():
    config = SepMEConfig.paper()
    assert (config.learning_rate, config.momentum, config.beta) == (0.1, 0.9, 1e-4)
    assert (config.sparsity, config.tolerance, config.relative) == (1e-6, 1e-4, False)
    assert (config.min_steps, config.max_steps, config.basis) == (10, 1000, "full")


def test_paper_takes_changes():
    assert SepMEConfig.paper(max_steps=20).max_steps == 20


def test_every_fault_is_named_at_once():
    with pytest.raises(ValueError, match=r"solver must be .*'guess'.*rank must be positive.*momentum must be in"):
        SepMEConfig(solver="guess", rank=0, momentum=1.0)


@pytest.mark.parametrize(
    "fault", [{"beta": float("nan")}, {"sparsity": -1}, {"min_steps": 9, "max_steps": 8}, {"gain": 0}, {"gate": 1}]
)
def test_out_of_range_is_refused(fault):
    with pytest.raises(ValueError, match=next(iter(fault))):
        SepMEConfig(**fault)


def test_round_trip_through_json():
    config = SepMEConfig(solver="closed_form", rank=5, seed=3)
    assert SepMEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_field_is_named():
    with pytest.raises(ValueError, match="'learning_speed'"):
        SepMEConfig.from_dict({"learning_speed": 1.0})
