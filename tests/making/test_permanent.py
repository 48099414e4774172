"""The unconstrained variant: it unlearns, and nothing is guarded or left to restore."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import Concept, SepMEConfig, SepMETrainer
from sepme_diffusers.doors.linears import cross_attentions
from small import TRAIN, latents

WOODCUT = Concept("woodcut", (("woodcut cat", "a cat"),))
CONFIG = replace(TRAIN, learning_rate=1e-3, max_steps=25, min_steps=4, tolerance=0.3)


@pytest.fixture
def changed(pipe):
    return SepMETrainer(pipe, CONFIG).erase_permanently([WOODCUT])


def test_every_cross_attention_weight_is_free_and_no_other(pipe, changed):
    names = {f"{name}.{key}" for name, a in cross_attentions(pipe.unet).items() for key, _ in a.named_parameters()}
    assert changed.keys() == names
    state = pipe.unet.state_dict()
    assert sum(not torch.equal(weight, state[name]) for name, weight in changed.items()) > len(names) / 2


def test_the_pipeline_is_left_as_it_was(pipe):
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    SepMETrainer(pipe, CONFIG).erase_permanently([WOODCUT])
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())


def test_it_lowers_the_correlation_and_moves_what_separate_erasure_guards(pipe, changed):
    """Against a separate increment of the same concept: the blank prompt stays there, and moves here."""
    steps = []
    SepMETrainer(pipe, CONFIG, on_step=steps.append).erase_permanently([WOODCUT])
    assert steps[-1].momentum < 0.9 * steps[0].momentum
    before = latents(pipe, "")
    pipe.load_sepme(SepMETrainer(pipe, TRAIN).erase([WOODCUT]))
    assert torch.equal(latents(pipe, "", erased=["woodcut"]), before)
    pipe.unload_sepme()
    pipe.unet.load_state_dict(changed, strict=False)
    assert not torch.equal(latents(pipe, ""), before)


def test_a_bank_acts_on_changed_weights_and_guards_and_restores_there(pipe, changed, text_bank):
    """A text-side bank of the original model: it edits the text before any weight reads it."""
    pipe.unet.load_state_dict(changed, strict=False)
    prompts = ("", "watermark", "neon cat", "a cat")
    before = {prompt: latents(pipe, prompt) for prompt in prompts}
    pipe.load_sepme(text_bank)
    erased = {prompt: latents(pipe, prompt, erased=["neon"]) for prompt in prompts}
    restored = {prompt: latents(pipe, prompt, erased=[]) for prompt in prompts}
    assert torch.equal(erased[""], before[""])
    assert torch.equal(erased["watermark"], before["watermark"])
    assert (erased["neon cat"] - before["neon cat"]).abs().max() > 1e-2
    assert all(torch.equal(restored[prompt], before[prompt]) for prompt in prompts)


FOX = Concept("fox", (("a fox", ""), ("neon fox", "neon")))


def test_the_prompt_without_the_concept_does_not_pay_for_it(pipe, changed):
    """The concept's own prompt moves; that without it moves far less, for it is no part of the loss."""
    before = {prompt: latents(pipe, prompt) for prompt in ("woodcut cat", "a cat")}
    pipe.unet.load_state_dict(changed, strict=False)
    moved = {prompt: float((latents(pipe, prompt) - before[prompt]).abs().mean()) for prompt in before}
    assert moved["a cat"] < moved["woodcut cat"]


def test_concepts_are_in_one_sum_until_each_is_unlearnt(pipe):
    """Every step measures all of them; the steps end when all statistics are at the threshold."""
    steps = []
    config = replace(CONFIG, max_steps=200)
    SepMETrainer(pipe, config, on_step=steps.append).erase_permanently([WOODCUT, FOX])
    names = [step.concept for step in steps]
    assert names == ["woodcut", "fox"] * (len(steps) // 2)
    assert len(steps) // 2 < config.max_steps
    first = {step.concept: step.loss for step in steps[:2]}
    for last in steps[-2:]:
        assert last.momentum <= config.tolerance * 1.5 * first[last.concept]


def test_no_tolerance_is_allowed(pipe):
    """The paper's for what must never come back: train until the correlation is zero."""
    config = replace(CONFIG, tolerance=0.0, max_steps=3, min_steps=1)
    assert SepMETrainer(pipe, config).erase_permanently([WOODCUT])
    with pytest.raises(ValueError, match="tolerance"):
        replace(CONFIG, tolerance=-1.0)


def test_the_papers_constants():
    config = SepMEConfig.unconstrained()
    assert (config.learning_rate, config.tolerance) == (1e-5, 0.0)
    assert replace(config, learning_rate=0.1, tolerance=1e-4) == SepMEConfig.paper()


def test_divergence_is_refused(pipe):
    with pytest.raises(FloatingPointError, match="'woodcut'"):
        SepMETrainer(pipe, replace(CONFIG, learning_rate=1e30)).erase_permanently([WOODCUT])


def test_a_noisy_batch_serves_its_steps(pipe):
    """The original model predicts once for all of them."""
    passes = []
    config = replace(CONFIG, min_steps=6, max_steps=6, steps_per_batch=3)
    trainer = SepMETrainer(pipe, config, on_step=lambda step: passes.append("step"))
    pipe.unet.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else passes.append("original"))
    trainer.erase_permanently([WOODCUT])
    first = passes.index("step")
    assert passes[first - 1 :] == ["original", *["step"] * 3, "original", *["step"] * 3]
