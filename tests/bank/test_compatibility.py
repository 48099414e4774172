import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from folders import manifest_of, reseal
from sepme_diffusers import BankError
from sepme_diffusers.bank.compatibility import refuse_other_text, refuse_other_weights
from sepme_diffusers.bank.guard_sets import GuardSet
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


def test_another_text_encoder_is_seen_by_its_sketch_and_by_its_leakage(text_bank):
    """Also where the base does not say how prompts are embedded."""
    other = random_pipeline(text_seed=1)
    with pytest.raises(ValueError, match=r"another text encoder.*prompts are embedded in another way"):
        refuse_other_text(other, [text_bank])
    doors = {name: replace(door, sketch=()) for name, door in text_bank.base.doors.items()}
    with pytest.raises(ValueError, match=r"another text encoder.*'neon'"):
        refuse_other_text(other, [replace(text_bank, base=replace(text_bank.base, doors=doors))])


@pytest.mark.parametrize("excuse", ["every guard leaks", "no guard"])
@pytest.mark.parametrize("text_seed", [0, 1])
def test_a_bank_cannot_excuse_itself_from_the_check_of_its_text_encoder(text_seed, excuse, text_bank):
    """With no exact guard there is none by which another encoder could be seen."""
    entry = text_bank["neon"]
    leaky = {"leakage": 1.0, "leakage_of": dict.fromkeys(entry.guards, 1.0)}
    excused = replace(entry, metrics=leaky) if excuse == "every guard leaks" else replace(entry, guard_set=GuardSet())
    pipe = random_pipeline(text_seed=text_seed)
    with pytest.raises(ValueError, match=r"\['neon'\]: no guard is exact"):
        refuse_other_text(pipe, [text_bank.with_entries([excused])])
    with pytest.raises(ValueError, match=r"\['neon'\]: no guard is exact"):
        pipe.load_sepme(text_bank.with_entries([excused]))
    assert pipe.get_bank() is None


@pytest.mark.parametrize("concept", ["neon", "woodcut"])
def test_numbers_that_no_check_on_loading_saw_are_refused_when_they_are_erased(concept, pipe, mixed_bank, tmp_path):
    """On loading A alone is read, of text-side and of per-module increments."""
    mixed_bank.save_pretrained(tmp_path)
    increment = mixed_bank[concept].increment

    def says_another_digest(manifest):
        manifest["concepts"][concept]["digest"] = "1" * 64

    reseal(tmp_path, says_another_digest)
    pipe.load_sepme(tmp_path)
    assert torch.equal(pipe.get_bank().entries.outline(concept).bases["tokens"], increment.A)
    with pytest.raises(BankError, match=rf"concept '{concept}'.*(digest|SHA-256)"):
        pipe.set_erased([concept])
    assert list(pipe.erased) == []
    pipe.unload_sepme()


def test_a_lora_without_an_a_does_not_load(pipe, mixed_bank, tmp_path):
    mixed_bank.save_pretrained(tmp_path)
    name = next(name for name, entry in mixed_bank.items() if entry.form == "module")
    record = manifest_of(tmp_path)["concepts"][name]
    file = tmp_path / record["folder"] / "adapter_model.safetensors"
    file.write_bytes(save({"x": torch.ones(1, 4)}))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    reseal(tmp_path, lambda manifest: manifest["concepts"][name]["files"].update({file.name: digest}))
    with pytest.raises(BankError, match=rf"concept '{name}'.*no lora_A"):
        pipe.load_sepme(tmp_path)
    assert pipe.get_bank() is None
