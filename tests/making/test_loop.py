"""The training loop: what is learnt, joint against separate, interruption, divergence."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from sepme_diffusers import Concept, SepMEConfig, SepMETrainer
from sepme_diffusers.algebra.objective import balance
from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.making import loop
from sepme_diffusers.making.learner import Learner
from sepme_diffusers.making.loop import attached, correlation, correlation_maps, learn, rescale, take_step
from sepme_diffusers.making.noise import NoisyPictures, Reference
from sepme_diffusers.making.state import TrainingState
from sepme_diffusers.text.encoding import Encoded, encode, rows
from small import CONCEPTS, TRAIN, random_pipeline

WOODCUT, NEON = Concept("woodcut", (("woodcut", ""),)), Concept("neon", (("neon", ""),))


def learner(pipe, concept, config=TRAIN, guards=("",), start=None):
    basis = null_space(rows(encode(pipe, guards)))[:8]
    pictures = NoisyPictures(pipe, concept, config, Encoded(pipe))
    return Learner(concept.name, config.beta * basis, projection_weights(pipe.unet), pictures, config, start)


@torch.no_grad()
def correlation_of(pipe, references, learners):
    with attached(pipe.unet, learners):
        return sum(correlation(pipe.unet, reference).item() for reference in references)


def equal(first, second):
    return first.tensors().keys() == second.tensors().keys() and all(
        torch.equal(t, second.tensors()[name]) for name, t in first.tensors().items()
    )


@pytest.mark.parametrize("form", ["module", "text"])
def test_what_is_trained_is_what_the_pipeline_then_does(pipe, form):
    """The denoiser with a learner attached predicts what it predicts with the increment loaded."""
    config = replace(TRAIN, parametrisation=form)
    one = learner(pipe, WOODCUT, config)
    with torch.no_grad():
        for factor in one.factors.values():
            factor.normal_()
    batch = one.pictures.next()
    with torch.no_grad(), attached(pipe.unet, [one]):
        trained = batch.predict_noise(pipe.unet, batch.with_concept)
    bank = SepMETrainer(pipe, replace(config, max_steps=4)).erase([WOODCUT])
    entry = replace(bank["woodcut"], increment=one.increment())
    assert entry.increment.form == form
    pipe.load_sepme(bank.with_entries([entry]), plain_pipelines="standing")
    pipe.set_erased(["woodcut"])
    with torch.no_grad():
        loaded = batch.predict_noise(pipe.unet, batch.with_concept)
    torch.testing.assert_close(trained, loaded, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_papers(pipe):
    """L_cor with three passes is that of four: with the blank prompt guarded the fourth equals the third."""
    one = learner(pipe, WOODCUT)
    with torch.no_grad():
        for factor in one.factors.values():
            factor.normal_()
    batch = one.pictures.next()
    reference = Reference.of(pipe.unet, batch)
    with torch.no_grad():
        with attached(pipe.unet, [one]):
            loss = correlation(pipe.unet, reference)
        frozen = [batch.predict_noise(pipe.unet, text) for text in (batch.with_concept, batch.without)]
        with attached(pipe.unet, [one]):
            edited = [batch.predict_noise(pipe.unet, text) for text in (batch.with_concept, batch.without)]
    product = (edited[0] - edited[1]) * (frozen[0] - frozen[1])
    assert loss.item() == pytest.approx(product.mean().item(), rel=1e-3)
    assert reference.correlation == pytest.approx((frozen[0] - frozen[1]).square().mean().item(), rel=1e-4)


def test_a_noisy_batch_serves_its_steps(pipe):
    """The original model, which is two of three passes, is asked once for all of them, and anew for the next batch."""
    passes = []
    pipe.unet.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    counts = {}
    for share in (1, 3):
        config = replace(TRAIN, min_steps=6, max_steps=6, steps_per_batch=share)
        one = learner(pipe, WOODCUT, config)
        passes.clear()
        learn(pipe, [one], config)
        counts[share] = (passes.count(False), passes.count(True))
    assert counts == {1: (6, 6), 3: (2, 6)}


def test_a_warm_start_is_the_closed_form(pipe):
    closed = SepMETrainer(pipe, SepMEConfig.linear(rank=8)).erase([CONCEPTS[0]])["neon"].increment
    basis = torch.linalg.svd(closed.A.double(), full_matrices=False).Vh
    weights = projection_weights(pipe.unet)
    for form in ("module", "text"):
        config = replace(TRAIN, parametrisation=form)
        pictures = NoisyPictures(pipe, CONCEPTS[0], config, Encoded(pipe))
        warm = Learner("neon", 0.01 * basis, weights, pictures, config, closed).increment()
        for name, delta in closed.delta_weights(weights).items():
            torch.testing.assert_close(warm.delta_weights(weights)[name], delta, rtol=1e-3, atol=1e-5)


def test_a_warm_start_is_scaled_to_where_the_correlation_is_small(pipe):
    """Too weak or too strong, it starts nearer to the target; what erases nothing is left alone."""
    closed = SepMETrainer(pipe, SepMEConfig.linear(rank=8)).erase([WOODCUT])["woodcut"].increment
    basis = torch.linalg.svd(closed.A.double(), full_matrices=False).Vh
    left = []
    for strength in (1.0, 1.5, 3.0):
        config = replace(TRAIN, batch_size=8)
        start = replace(closed, B=strength * closed.B)
        pictures = NoisyPictures(pipe, WOODCUT, config, Encoded(pipe))
        one = Learner("woodcut", 0.01 * basis, projection_weights(pipe.unet), pictures, config, start)
        references = [Reference.of(pipe.unet, one.pictures.next()) for _ in range(4)]
        scale = sum(reference.correlation for reference in references)
        before = correlation_of(pipe, references, [one])
        rescale(pipe.unet, one, config.batch_size)
        after = correlation_of(pipe, references, [one])
        left.append(abs(after) / scale)
        assert abs(after) < max(abs(before), 0.2 * scale)
    assert max(left) < 0.3


def test_what_training_did_too_much_is_taken_back(pipe):
    """The statistic follows the loss with a delay; scaled once on fresh noise, the loss is nearer to zero."""
    config = replace(TRAIN, beta=0.05, tolerance=0.02, max_steps=200, momentum=0.9, batch_size=8, n_images=8)
    learners = {rescaled: learner(pipe, WOODCUT, replace(config, rescale=rescaled)) for rescaled in (False, True)}
    for rescaled, one in learners.items():
        learn(pipe, [one], replace(config, rescale=rescaled))
        assert one.stopped
    references = [Reference.of(pipe.unet, learners[True].pictures.next()) for _ in range(4)]
    scale = sum(reference.correlation for reference in references)
    before, after = (correlation_of(pipe, references, [one]) / scale for one in learners.values())
    assert before < -0.1
    assert abs(after) < 0.5 * abs(before)
    (weak, strong) = (sum(float(f.detach().norm()) for f in learners[key].factors.values()) for key in (True, False))
    assert weak < strong


def test_joint_gradients_of_mutually_guarded_concepts_are_the_separate_ones(pipe):
    """Decoupled increments do not meet: L_i does not depend on ΔW_k, so only the weights η tell them apart."""
    woodcut, neon = learner(pipe, WOODCUT, guards=("", "neon")), learner(pipe, NEON, guards=("", "woodcut"))
    with torch.no_grad():
        for factor in (*woodcut.factors.values(), *neon.factors.values()):
            factor.normal_()
    batch = Reference.of(pipe.unet, woodcut.pictures.next())
    own, others = list(woodcut.factors.values()), list(neon.factors.values())
    with attached(pipe.unet, [woodcut]):
        alone = torch.autograd.grad(correlation(pipe.unet, batch), own)
    with attached(pipe.unet, [woodcut, neon]):
        together = torch.autograd.grad(correlation(pipe.unet, batch), [*own, *others])
    size = max(gradient.abs().max() for gradient in alone)
    for mine, joint in zip(alone, together, strict=False):
        assert (mine - joint).abs().max() < 1e-3 * size
    assert max(gradient.abs().max() for gradient in together[len(own) :]) < 1e-3 * size


def test_joint_and_separate_training_agree_where_concepts_are_guarded(pipe):
    """One concept's Adam hardly feels η, so what joint training reaches is what separate training reaches."""
    config = replace(TRAIN, beta=0.05, max_steps=60, min_steps=10, tolerance=0.3)
    separate = SepMETrainer(pipe, config).erase([WOODCUT, NEON])
    joint = SepMETrainer(pipe, replace(config, coupling="joint")).erase([WOODCUT, NEON])
    weights = projection_weights(pipe.unet)
    for name in ("woodcut", "neon"):
        assert joint[name].metrics["stopped_by_rule"]
        assert separate[name].metrics["stopped_by_rule"]
        assert joint[name].guards == separate[name].guards
        pairs = zip(
            separate[name].increment.delta_weights(weights).values(),
            joint[name].increment.delta_weights(weights).values(),
            strict=True,
        )
        first, second = (torch.cat([d.flatten() for d in some]) for some in zip(*pairs, strict=True))
        assert torch.nn.functional.cosine_similarity(first, second, dim=0) > 0.9


def test_joint_training_sees_what_unguarded_concepts_do_to_each_other(pipe):
    """Concepts that share prompts are not decoupled there: joint training differs from separate."""
    first = Concept("fox", (("neon fox", "neon"),))
    second = Concept("glow", (("neon fox", "fox"),))
    config = replace(TRAIN, beta=0.05, max_steps=20, min_steps=20)
    separate = SepMETrainer(pipe, config).erase([first, second])
    joint = SepMETrainer(pipe, replace(config, coupling="joint")).erase([first, second])
    batch = NoisyPictures(pipe, first, config, Encoded(pipe)).next()

    def left(bank):
        pipe.load_sepme(bank, plain_pipelines="standing")
        pipe.set_erased(list(bank))
        with torch.no_grad():
            predicted = batch.predict_noise(pipe.unet, batch.with_concept)
        pipe.unload_sepme()
        return predicted

    assert not torch.allclose(left(separate), left(joint), atol=1e-3)


def test_nan_is_refused_and_the_bank_untouched(pipe, text_bank):
    config = replace(TRAIN, learning_rate=1e30, max_steps=20, min_steps=10)
    with pytest.raises(FloatingPointError, match=r"the loss of 'woodcut' is \S+ at step \d+.*learning_rate"):
        SepMETrainer(pipe, config).erase([WOODCUT], text_bank)
    assert list(text_bank) == ["neon", "cat", "pencil"]
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"steps_per_batch": 1}, 4),
        ({"steps_per_batch": 2}, 5),
        ({"steps_per_batch": 2, "coupling": "joint", "parametrisation": "text"}, 5),
    ],
)
def test_interrupted_training_goes_on_with_the_same_result(pipe, tmp_path, changes, first, monkeypatch):
    """From the last state, which is written between noisy batches, so that none of them is drawn anew or left out."""
    monkeypatch.setattr("sepme_diffusers.making.loop._SAVE_EVERY", 3)
    config = replace(TRAIN, max_steps=8, min_steps=8, **changes)
    whole = SepMETrainer(pipe, config).erase([WOODCUT, NEON])

    class Interrupted(Exception):
        pass

    def stop_at_5(step):
        if step.concept == "neon" and step.step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        SepMETrainer(pipe, config, on_step=stop_at_5, state=tmp_path).erase([WOODCUT, NEON])
    seen = []
    resumed = SepMETrainer(pipe, config, on_step=seen.append, state=tmp_path).erase([WOODCUT, NEON])
    assert [step.step for step in seen if step.concept == "neon"] == list(range(first, 9))
    assert all(equal(whole[name].increment, resumed[name].increment) for name in whole)
    assert all(whole[name].metrics == resumed[name].metrics for name in whole)
    seen.clear()
    again = SepMETrainer(pipe, config, on_step=seen.append, state=tmp_path).erase([WOODCUT, NEON])
    assert not seen
    assert all(equal(whole[name].increment, again[name].increment) for name in whole)


def test_a_state_of_other_settings_is_refused(pipe, tmp_path):
    SepMETrainer(pipe, TRAIN, state=tmp_path).erase([WOODCUT])
    with pytest.raises(ValueError, match="training state of other concepts, settings"):
        SepMETrainer(pipe, replace(TRAIN, seed=1), state=tmp_path).erase([WOODCUT])
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="not a training state"):
        SepMETrainer(pipe, TRAIN, state=tmp_path).erase([WOODCUT])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_killed_process_leaves_a_state_to_go_on_from(pipe, tmp_path, monkeypatch):
    """SIGKILL at any moment: what stands under the name is always whole."""
    monkeypatch.setattr(loop, "_SAVE_EVERY", 2)
    config = replace(TRAIN, max_steps=400, min_steps=400)
    if (child := os.fork()) == 0:
        try:
            # More would wait for threads that were not forked.
            torch.set_num_threads(1)
            SepMETrainer(pipe, config, state=tmp_path).erase([WOODCUT])
        finally:
            os._exit(1)
    while not (files := list(tmp_path.glob("*.safetensors"))):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with safe_open(files[0], "pt") as file:
        fingerprint = file.metadata()["fingerprint"]
    _, record = TrainingState(files[0], fingerprint)._read()
    assert record["step"] >= 2


def test_progress_shows_momentum(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    SepMETrainer(pipe, TRAIN).erase([WOODCUT])
    shown = capsys.readouterr().err
    assert "woodcut" in shown
    assert "momentum=" in shown


def test_random_pipelines_are_alike():
    """What another process trains on is the same model."""
    first, second = (random_pipeline().unet.state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_concepts_share_passes_and_take_the_step_that_they_take_alone(pipe, batch_size):
    """Of small batches several share a pass; the gradient is that of Σ η_i L_i whatever shares."""
    config = replace(TRAIN, batch_size=batch_size, steps_per_batch=1, learning_rate=1.0)
    guarded = {"woodcut": ("", "neon", "a fox"), "neon": ("", "woodcut", "a fox"), "fox": ("", "woodcut", "neon")}
    concepts = [WOODCUT, NEON, Concept("fox", (("a fox", ""),))]
    learners = [learner(pipe, concept, config, guards=guarded[concept.name]) for concept in concepts]
    passes = []
    pipe.unet.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    factors = [factor for one in learners for factor in one.factors.values()]
    take_step(pipe.unet, learners, learners, torch.optim.SGD(factors, lr=1.0), config)
    assert passes.count(True) == {1: 1, 2: 1, 8: 3}[batch_size]
    assert passes.count(False) == passes.count(True)
    moved = [factor.detach().clone() for factor in factors]
    sizes, slopes = [], []
    with torch.no_grad():
        for factor in factors:
            factor.zero_()
    for one in learners:
        with attached(pipe.unet, learners):
            (product,) = correlation_maps(pipe.unet, [one.reference])
            slopes.append(torch.autograd.grad(product.mean(), factors, allow_unused=True))
        sizes.append(float(product.detach().norm()))
    for index, factor in enumerate(moved):
        shares = zip(balance(sizes), slopes, strict=True)
        expected = sum(share * slope[index] for share, slope in shares if slope[index] is not None)
        torch.testing.assert_close(factor, -expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
