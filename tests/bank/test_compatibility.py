from dataclasses import replace

import pytest

from sepme_diffusers.bank.compatibility import refuse_other_text, refuse_other_weights, text_state
from sepme_diffusers.doors.linears import projection_weights
from small import random_pipeline


def test_a_bank_fits_its_own_base(pipe, mixed_bank):
    refuse_other_weights(mixed_bank, projection_weights(pipe.unet))
    refuse_other_text(pipe, [mixed_bank])


def test_text_side_increments_fit_every_unet_and_per_module_ones_do_not(text_bank, mixed_bank):
    weights = {name: weight * 1.1 for name, weight in projection_weights(random_pipeline(seed=1).unet).items()}
    refuse_other_weights(text_bank, weights)
    with pytest.raises(ValueError, match=r"this UNet has other weights than .*Text-side increments"):
        refuse_other_weights(mixed_bank, weights)


def test_another_text_encoder_is_seen_by_its_leakage(text_bank):
    with pytest.raises(ValueError, match=r"another text encoder.*'neon'"):
        refuse_other_text(random_pipeline(text_seed=1), [text_bank])


@pytest.mark.parametrize("text_seed", [0, 1])
def test_a_bank_cannot_excuse_itself_from_the_check_of_its_text_encoder(text_seed, text_bank):
    """Every guard stated to leak, and none is left by which another encoder could be seen."""
    entry = text_bank["neon"]
    leaky = replace(entry, metrics={"leakage": 1.0, "leakage_of": dict.fromkeys(entry.guards, 1.0)})
    with pytest.raises(ValueError, match=r"\['neon'\]: every guard is listed in metrics\.leakage_of"):
        refuse_other_text(random_pipeline(text_seed=text_seed), [text_bank.with_entries([leaky])])


def test_the_text_encoders_state_changes_with_its_weights_and_its_adapters(pipe):
    """Cheap enough to be asked before every call; a cast is no reason to be asked in vain for ever."""
    before = text_state(pipe)
    assert text_state(pipe) == before
    pipe.text_encoder.load_state_dict(random_pipeline(text_seed=1).text_encoder.state_dict())
    assert text_state(pipe) != before
    assert text_state(random_pipeline()) != before
