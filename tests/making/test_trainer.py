import os
import stat
from dataclasses import replace

import pytest
import torch

from sepme_diffusers import Concept, SepMEConfig, SepMETrainer
from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.making.soft_guards import SoftGuards
from sepme_diffusers.text.encoding import encode, rows
from small import CLOSED, CONCEPTS, TRAIN, latents, random_pipeline

WOODCUT = Concept("woodcut", (("woodcut cat", "a cat"),))


def test_increments_lie_in_the_guards_null_space(pipe, mixed_bank):
    for name, entry in mixed_bank.items():
        null = null_space(rows(encode(pipe, list(entry.guards))))
        a = entry.increment.A.double()
        assert (a - a @ null.T @ null).norm() < 1e-5 * a.norm(), name


def test_guards_are_blank_watermark_and_every_other_concept(mixed_bank):
    assert list(mixed_bank["cat"].guards) == ["", "watermark", "neon", "pencil"]
    assert list(mixed_bank["woodcut"].guards) == ["", "watermark", "neon", "cat", "pencil"]


def test_earlier_increments_are_untouched(text_bank, mixed_bank):
    assert all(mixed_bank[name] is entry for name, entry in text_bank.items())


@pytest.fixture
def other_unet(pipe):
    """A base with the same text encoder and another UNet."""
    other = random_pipeline()
    other.unet = random_pipeline(seed=9).unet
    other.register_to_config(_name_or_path="a fine-tune")
    return other


def test_a_bank_of_another_unet_takes_no_per_module_increment(text_bank, other_unet):
    """The bank holds text-side increments alone, which serve both bases, but would call the new one its own base's."""
    digest, seen = text_bank.digest, []
    trainer = SepMETrainer(other_unet, TRAIN, on_step=seen.append)
    bases = f"made on {text_bank.base.name!r}.* 'a fine-tune', cannot join it: text projections have other weights"
    with pytest.raises(ValueError, match=f"{bases}.* solver='closed_form' or parametrisation='text'"):
        trainer.erase([WOODCUT], text_bank)
    assert text_bank.digest == digest
    assert not seen
    assert list(trainer.capacity([WOODCUT], text_bank)) == ["woodcut"]


@pytest.mark.parametrize("config", [CLOSED, replace(TRAIN, parametrisation="text")], ids=["closed form", "trained"])
def test_a_bank_of_another_unet_takes_a_text_side_increment(pipe, text_bank, other_unet, config):
    bank = SepMETrainer(other_unet, config, guards=["watermark"]).erase([WOODCUT], text_bank)
    assert bank["woodcut"].increment.form == "text"
    assert bank.base == text_bank.base
    before, guarded = latents(pipe, "woodcut cat"), latents(pipe, "watermark")
    pipe.load_sepme(bank)
    assert torch.equal(latents(pipe, "watermark", erased=["woodcut"]), guarded)
    assert not torch.equal(latents(pipe, "woodcut cat", erased=["woodcut"]), before)


def test_training_leaves_the_model_as_it_was(pipe):
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    before = latents(pipe, "woodcut cat")
    SepMETrainer(pipe, TRAIN).erase([WOODCUT])
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipe.unet.state_dict().items())
    assert torch.equal(latents(pipe, "woodcut cat"), before)
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
    assert all(not module._forward_hooks for module in pipe.unet.modules())


def test_training_repeats_bit_for_bit_and_the_seed_matters(pipe):
    first, again, other = (
        SepMETrainer(pipe, replace(TRAIN, seed=seed)).erase([WOODCUT])["woodcut"].increment for seed in (0, 0, 1)
    )
    assert all(torch.equal(c, again.C[name]) for name, c in first.C.items())
    assert not all(torch.equal(c, other.C[name]) for name, c in first.C.items())


def test_training_lowers_the_correlation_and_stops_by_the_rule(pipe):
    seen = []
    config = replace(TRAIN, beta=0.05, max_steps=200, tolerance=0.5)
    bank = SepMETrainer(pipe, config, on_step=seen.append).erase([WOODCUT])
    metrics = bank["woodcut"].metrics
    assert metrics["stopped_by_rule"]
    assert metrics["steps"] == len(seen) < 200
    assert seen[-1].momentum <= 0.5 * seen[0].loss < seen[-2].momentum or seen[-1].step == config.min_steps


def test_training_runs_out_of_steps_honestly(pipe):
    config = replace(TRAIN, beta=1e-6, max_steps=4)
    assert SepMETrainer(pipe, config).erase([WOODCUT])["woodcut"].metrics["stopped_by_rule"] is False


def test_full_basis_is_the_papers(pipe):
    config = SepMEConfig.paper(max_steps=12, n_images=1, image_steps=2)
    entry = SepMETrainer(pipe, config).erase([WOODCUT])["woodcut"]
    null = null_space(rows(encode(pipe, list(entry.guards))))
    torch.testing.assert_close(entry.increment.A.double(), 1e-4 * null, rtol=1e-5, atol=1e-9)


def test_soft_guards_are_moved_less(pipe):
    prompts = ["a dog", "a fox", "a bus"]
    moved = []
    for soft in ((), prompts):
        config = SepMEConfig.linear(soft_guard_weight=1000.0)
        increment = SepMETrainer(pipe, config, regular=soft).erase([CONCEPTS[1]])["cat"].increment
        moved.append((rows(encode(pipe, prompts)) @ increment.A.T @ increment.B.T).norm())
    assert moved[1] < 0.5 * moved[0]


def test_wrong_concepts_are_refused_before_any_work(pipe):
    with pytest.raises(ValueError, match="no concept given"):
        SepMETrainer(pipe, CLOSED).erase([])
    with pytest.raises(TypeError, match="list of concepts"):
        SepMETrainer(pipe, CLOSED).erase("neon")


@pytest.mark.parametrize(
    "config", [replace(CLOSED, rank=1, soft_guard_weight=30.0), TRAIN], ids=["text-side", "per-module"]
)
def test_a_gated_increment_leaves_every_other_prompt_to_the_bit(pipe, config):
    """Not only guards: also prompts that nobody listed. What it was made for is changed as without the gate."""
    regular = ["a picture of a house", "a dog", "neon", "a picture of a bus"]
    before, own = latents(pipe, regular), CONCEPTS[1].prompts
    soft = ["a dog", "a picture of a bus"]
    trainers = {gate: SepMETrainer(pipe, replace(config, gate=gate), regular=soft) for gate in (None, 0.9)}
    made = {gate: trainer.erase([CONCEPTS[1]]) for gate, trainer in trainers.items()}
    assert made[0.9]["cat"].increment.gate > 0
    changed = {}
    for gate, bank in made.items():
        pipe.load_sepme(bank)
        changed[gate] = latents(pipe, regular, erased=["cat"]), latents(pipe, list(own), erased=["cat"])
        pipe.unload_sepme()
    assert torch.equal(changed[0.9][0], before)
    assert not torch.equal(changed[None][0], before)
    assert torch.equal(changed[0.9][1], changed[None][1])
    assert not torch.equal(changed[0.9][1], latents(pipe, list(own)))


def test_damped_names_that_leave_the_gate_shut_are_promised_exactly(pipe):
    """Hundreds of names cannot all be in the guard; the gate keeps them apart all the same."""
    config = replace(CLOSED, rank=1, gate=0.9, reserve=0.99, name_weight=0.0)
    bank = SepMETrainer(pipe, config).erase(CONCEPTS)
    assert bank["cat"].metrics["leakage"] < 1e-5
    assert not bank["cat"].metrics.keys() & {"leakage_of", "leakage_rest"}
    assert bank.guarantees["neon"].exact
    before = latents(pipe, "neon")
    pipe.load_sepme(bank)
    assert torch.equal(latents(pipe, "neon", erased=["cat", "pencil"]), before)
    assert not torch.equal(latents(pipe, "neon", erased=["neon"]), before)


def test_increments_are_made_on_the_original_model_whatever_is_erased(pipe, text_bank):
    """Also what is erased after the trainer was built, and what a policy always erases."""
    expected = SepMETrainer(pipe, TRAIN).erase([WOODCUT])["woodcut"].increment
    trainer = SepMETrainer(pipe, TRAIN)
    pipe.load_sepme(replace(text_bank, always=("cat",)))
    pipe.set_erased(["neon"])
    increment = trainer.erase([WOODCUT])["woodcut"].increment
    assert all(torch.equal(tensor, expected.tensors()[name]) for name, tensor in increment.tensors().items())
    assert pipe.erased == ("neon", "cat")
    trainer.erase_permanently([WOODCUT])


def test_training_states_and_soft_guards_are_on_the_disk_when_they_are_written(pipe, tmp_path, monkeypatch):
    """Each file is flushed to the disk before it gets its name, and its folder after."""
    events = []
    fsync, replace_name = os.fsync, os.replace

    def note_fsync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def note_replace(source, target):
        events.append("name")
        replace_name(source, target)

    monkeypatch.setattr("os.fsync", note_fsync)
    monkeypatch.setattr("os.replace", note_replace)
    SepMETrainer(pipe, TRAIN, state=tmp_path).erase([WOODCUT])
    assert events == ["file", "name", "folder"]
    events.clear()
    SoftGuards.from_prompts(pipe, ["a dog"]).save(tmp_path / "soft.safetensors")
    assert events == ["file", "name", "folder"]
