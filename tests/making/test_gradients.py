"""Gradients of a training step: with checkpoints, in float16, without the model's own, one dense change at a time."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sepme_diffusers import Concept, SepMETrainer
from sepme_diffusers.algebra.objective import sparsity
from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.making.gradients import frozen, gradients
from sepme_diffusers.making.learner import Learner
from sepme_diffusers.making.loop import attached, correlation, learn, take_step
from sepme_diffusers.making.noise import NoisyPictures, Reference
from sepme_diffusers.text.encoding import Encoded, encode, rows
from small import TRAIN, random_pipeline

WOODCUT = Concept("woodcut", (("woodcut", ""),))


def learner(pipe, config=TRAIN):
    basis = null_space(rows(encode(pipe, [""])))[:8]
    pictures = NoisyPictures(pipe, WOODCUT, config, Encoded(pipe))
    return Learner("woodcut", config.beta * basis, projection_weights(pipe.unet), pictures, config)


def flat(tensors):
    return torch.cat([tensor.flatten().double() for tensor in tensors])


@pytest.mark.parametrize("form", ["module", "text"])
def test_gradient_checkpointing_changes_nothing_but_memory(pipe, form):
    config = replace(TRAIN, parametrisation=form)
    plain = SepMETrainer(pipe, config).erase([WOODCUT])["woodcut"].increment
    pipe.unet.enable_gradient_checkpointing()
    checkpointed = SepMETrainer(pipe, config).erase([WOODCUT])["woodcut"].increment
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(checkpointed.tensors()[name], tensor, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_changes_no_permanently_changed_weight(pipe):
    """Run again for the gradient, the denoiser has the changed weights, not its own."""
    config = replace(TRAIN, learning_rate=1e-2, min_steps=6)
    plain = SepMETrainer(pipe, config).erase_permanently([WOODCUT])
    pipe.unet.enable_gradient_checkpointing()
    checkpointed = SepMETrainer(pipe, config).erase_permanently([WOODCUT])
    state = pipe.unet.state_dict()
    change = flat(weight - state[name] for name, weight in plain.items())
    difference = flat(checkpointed[name] - weight for name, weight in plain.items())
    assert difference.norm() < 1e-2 * change.norm()


@pytest.fixture(scope="module")
def references():
    """By precision a pipeline, a learner's pictures and a batch of as many numbers as eight latents of SD 1.x."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        pipe = random_pipeline()
        with torch.no_grad():
            pictures = learner(pipe, replace(TRAIN, batch_size=2)).pictures
        pictures.config = replace(TRAIN, batch_size=512)
        batch = pictures.next()
        assert batch.noisy.numel() == 8 * 4 * 64 * 64
        pipe.unet.to(dtype)
        found[dtype] = pipe, pictures, Reference.of(pipe.unet, batch)
    return found


@pytest.mark.parametrize("form", ["module", "text"])
def test_float16_takes_the_gradient_of_float32(form, references):
    """Unscaled, the gradient underflows."""
    config = replace(TRAIN, parametrisation=form, batch_size=512)
    slopes = {}
    for dtype, (pipe, pictures, reference) in references.items():
        one = Learner("woodcut", rows(encode(pipe, ["a fox"]))[:8], projection_weights(pipe.unet), pictures, config)
        factors = list(one.factors.values())
        with frozen(pipe.unet), attached(pipe.unet, [one]):
            loss = correlation(pipe.unet, reference)
            if dtype == torch.float16:
                slopes["unscaled"] = flat(torch.autograd.grad(loss, factors, retain_graph=True))
            slopes[dtype] = flat(gradients(loss, factors, dtype, reference.slope))
    cosine = {
        name: float(torch.cosine_similarity(slope, slopes[torch.float32], dim=0)) for name, slope in slopes.items()
    }
    assert cosine["unscaled"] < 0.99
    assert cosine[torch.float16] >= 0.999
    assert slopes[torch.float16].norm() == pytest.approx(float(slopes[torch.float32].norm()), rel=1e-2)


def test_a_gradient_that_overflows_takes_a_smaller_scale_or_is_refused():
    x = torch.tensor(1.0, requires_grad=True)
    amplified = (x.half() * 1e4).float() * 1e-6
    (slope,) = gradients(amplified, [x], torch.float16, 1e-6)
    assert float(slope) == pytest.approx(1e-2, rel=1e-2)
    x = torch.tensor(1e-5, requires_grad=True)
    hopeless = (x.half() * 6e4 * 6e4).float() * 1e-6
    with pytest.raises(FloatingPointError, match="float32 or bfloat16"):
        gradients(hopeless, [x], torch.float16, 1e-6)


class Stop(Exception):
    pass


@pytest.mark.parametrize("permanent", [False, True])
def test_no_weight_of_the_model_requires_a_gradient_inside_the_pass(pipe, permanent):
    flags = []
    edited = {name for name, _ in pipe.unet.named_parameters() if "attn2" in name} if permanent else set()
    pipe.unet.conv_out.bias.requires_grad_(False)

    def look(*_):
        if torch.is_grad_enabled():
            flags.append({name for name, p in pipe.unet.named_parameters() if p.requires_grad})

    pipe.unet.register_forward_hook(look)
    trainer = SepMETrainer(pipe, TRAIN)
    make = trainer.erase_permanently if permanent else trainer.erase
    make([WOODCUT])
    assert len(flags) == TRAIN.max_steps
    assert all(flag == edited for flag in flags)
    assert [name for name, p in pipe.unet.named_parameters() if not p.requires_grad] == ["conv_out.bias"]

    def fail(*_):
        if torch.is_grad_enabled():
            raise Stop

    pipe.unet.register_forward_hook(fail)
    with pytest.raises(Stop):
        make([WOODCUT])
    assert [name for name, p in pipe.unet.named_parameters() if not p.requires_grad] == ["conv_out.bias"]


class Alive(TorchDispatchMode):
    """Counts tensors of some shapes that are alive at once, beside those that were there before."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.storages, self.most = shapes, {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and tuple(result.shape) in self.shapes:
            self.storages[result.untyped_storage().data_ptr()] = weakref.ref(result)
            self.most = max(self.most, sum(alive() is not None for alive in self.storages.values()))
        return result


@pytest.mark.parametrize("form", ["module", "text"])
def test_the_sparsity_term_holds_one_dense_change_at_a_time_and_has_the_same_gradient(pipe, form):
    trained = learner(pipe, replace(TRAIN, parametrisation=form))
    with torch.no_grad():
        for factor in trained.factors.values():
            factor.normal_()
    weights, shared = trained.weights, trained.factors.get("B")
    dense = [(trained.factors[m] if shared is None else w @ shared) @ trained.basis for m, w in weights.items()]
    expected = torch.autograd.grad(sparsity(dense), list(trained.factors.values()))
    del dense
    with Alive({tuple(weight.shape) for weight in weights.values()}) as alive:
        slopes = trained.sparsity_gradient()
    assert alive.most == 1
    for (key, slope), wanted in zip(slopes.items(), expected, strict=True):
        torch.testing.assert_close(slope, wanted, msg=key)


def test_a_step_follows_the_sparsity_term(pipe):
    """With nothing else to lower, training makes the increments smaller."""
    trained = learner(pipe, replace(TRAIN, sparsity=1e6, max_steps=1, min_steps=1))
    with torch.no_grad():
        for factor in trained.factors.values():
            factor.normal_()
    before = {key: factor.detach().clone() for key, factor in trained.factors.items()}
    expected = trained.sparsity_gradient()
    learn(pipe, [trained], replace(TRAIN, sparsity=1e6, max_steps=1, min_steps=1))
    moved = flat(trained.factors[key].detach() - factor for key, factor in before.items())
    assert torch.equal(moved.sign(), -flat(expected.values()).sign())


def test_a_step_can_be_taken_alone(pipe):
    trained, steps = learner(pipe), []
    optimizer = torch.optim.Adam(trained.factors.values(), lr=0.1)
    take_step(pipe.unet, [trained], [trained], optimizer, TRAIN, steps.append)
    assert [step.step for step in steps] == [1]
