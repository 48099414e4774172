"""The benchmarks that are quick enough, and what the slow ones are made of, at small sizes."""

import copy
import sys

import pytest
import torch

from sepme_diffusers import SepMEConfig
from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.evaluation.baselines.paper import PaperStep, null_space_by_elimination
from sepme_diffusers.evaluation.bench import inference, making, runner
from sepme_diffusers.evaluation.bench.shapes import random_module
from sepme_diffusers.text.concept import BLANK
from sepme_diffusers.text.encoding import encode, rows


def number(figure: str, unit: str = " x") -> float:
    return float(figure.removesuffix(unit))


@pytest.fixture
def small_bench(pipe) -> inference.Bench:
    """The benchmarks with a pocket-size model in the place of the large one."""
    made = inference.Bench(repeats=1)
    made.large = pipe
    return made


def test_measures_are_those_at_inference_and_those_of_making():
    assert {"switching", "disk", "guard_basis", "training_step", "hundred_concepts", "steps_to_stop"} <= set(
        inference.MEASURES
    )
    assert not {"large", "small"} & set(inference.MEASURES)
    assert all(getattr(inference.Bench, name).__doc__ for name in inference.MEASURES)


def test_the_benchmark_of_the_built_in_model_runs():
    chosen = inference.Bench(repeats=1, steps=1)
    table = inference.table(chosen, inference.run(chosen, ("loop_built_in",)))
    ((measure, bar, figure, _),) = table.rows
    assert (measure, bar) == ("denoising: built-in model, 10 active of 110", "<= 1.10")
    assert number(figure) > 0


def test_unknown_measures_are_refused():
    with pytest.raises(ValueError, match=r"unknown measures \['speed'\]; there are .*'switching'"):
        inference.run(inference.Bench(), ("speed",))


def test_elimination_spans_the_same_null_space():
    torch.manual_seed(0)
    guard = torch.randn(5, 12)
    ours, theirs = null_space(guard), null_space_by_elimination(guard)
    assert theirs.shape == (7, 12)
    torch.testing.assert_close(theirs.norm(dim=1), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(theirs @ ours.T @ ours, theirs, rtol=0, atol=1e-6)


def test_elimination_without_sympy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sympy", None)
    with pytest.raises(ImportError, match=r"sympy: pip install 'sepme-diffusers\[eval\]'"):
        null_space_by_elimination(torch.eye(2))


def test_elimination_says_what_was_timed(small_bench):
    guard = rows(encode(small_bench.large, [BLANK]))
    found = small_bench._against_elimination(guard, guard)
    assert number(found.figure) > 0
    assert found.detail.startswith("16 x 384 tokens")


def test_the_papers_step_lowers_its_loss_and_leaves_both_models_as_they_were(pipe):
    torch.manual_seed(0)
    edited = copy.deepcopy(pipe.unet)
    before = {name: tensor.clone() for name, tensor in edited.state_dict().items()}
    concept, blank = encode(pipe, ["neon cat"]), encode(pipe, [BLANK])
    config = SepMEConfig.paper(beta=0.02)
    act = PaperStep(pipe.unet, edited, null_space(rows(blank)), concept, blank, config)
    noisy, at = making.picture(pipe)
    losses = [act(noisy, at) for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]
    for unet in (edited, pipe.unet):
        assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
        assert all(not module._forward_hooks for module in unet.modules())
    assert all(parameter.grad is None for parameter in edited.parameters())


def test_the_papers_first_loss_is_that_of_the_original(pipe):
    """Unedited, the correlation is the mean square of r_c; the blank prompt's prediction never moves."""
    act = making.paper_step(pipe, copy.deepcopy(pipe.unet), freeze=True)
    noisy, at = making.picture(pipe)
    with torch.no_grad():
        with_concept, without = (pipe.unet(noisy, at, encode(pipe, [text])).sample for text in ("cat", BLANK))
    assert act(noisy, at) == pytest.approx(float((with_concept - without).square().mean()), rel=1e-4)


def test_the_authors_step_computes_gradients_of_all_weights(pipe):
    edited = copy.deepcopy(pipe.unet)
    making.paper_step(pipe, edited, freeze=False)(*making.picture(pipe))
    assert sum(parameter.grad is not None for parameter in edited.parameters()) > 50


def test_a_training_step_takes_turns_with_the_papers(small_bench):
    before = {name: tensor.clone() for name, tensor in small_bench.large.unet.state_dict().items()}
    found = small_bench._step_times(small_bench.large)
    new, mean = "time of a training step, with new noise, ", "time of a training step, mean of the 4 on a batch, "
    assert [one.measure for one in found] == [
        f"{ours}against {theirs}" for ours in (new, mean) for theirs in making.AGAINST.values()
    ]
    assert all(number(one.figure) > 0 for one in found)
    assert all(torch.equal(t, before[name]) for name, t in small_bench.large.unet.state_dict().items())


def test_a_peak_does_not_start_from_that_of_the_process_that_asks(pipe):
    held = torch.ones(150_000_000)  # 600 MB
    here = runner.peak_resident()
    there = making.alone(runner.peak_resident)
    assert there < here - held.nbytes / 2


def test_many_concepts_are_compared_with_one_fused_edit(small_bench):
    found = small_bench._many(["cat", "dog", "fox"], "<= 2 x")
    assert found.measure == "closed form of 3 concepts"
    assert number(found.figure) > 0
    assert "encoding the 4 prompts once" in found.detail


def test_steps_to_the_stopping_rule_are_counted(small_bench):
    config = SepMEConfig(solver="closed_form+train", tolerance=0.9, n_images=2, batch_size=2, image_steps=1)
    found = small_bench._steps_to_stop(("neon",), config)
    assert 0 < number(found.figure) < 10
    assert "neon 1" in found.detail


def test_a_concept_on_disk_is_measured_in_both_forms(small_bench):
    """Compact, a concept takes less than with A in float32, and much less than a LoRA with A in every module."""
    for result, most in zip(small_bench.disk(), (0.7, 0.3), strict=True):
        wide = float(result.detail.rpartition(": ")[2].removesuffix(" KB"))
        assert 0 < number(result.figure, " KB") < most * wide


def test_random_modules_are_equal_at_every_call_and_keep_a_signal_alive():
    layers = [torch.nn.Linear, torch.nn.LayerNorm]

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(*(layers[0](64, 64) for _ in range(6)), layers[1](64))

    first, again = random_module(build), random_module(build, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in again.parameters())
    torch.testing.assert_close(first[0].weight, again[0].weight.float(), rtol=0.01, atol=0)
    assert not torch.equal(first[0].weight, first[1].weight)
    assert torch.linalg.matrix_rank(first[0].weight) == 64
    signal = first[:6](torch.randn(32, 64))
    assert 0.3 < signal.std() < 3


def test_modules_with_unknown_buffers_are_refused():
    with pytest.raises(ValueError, match=r"BatchNorm1d has a buffer 'running_mean'"):
        random_module(lambda: torch.nn.BatchNorm1d(4))


@pytest.mark.slow
def test_the_memory_of_a_hundred_concepts_is_that_of_their_factors():
    """At Stable Diffusion 1.5's shape, in float16: never dense, never a copy for every module."""
    text, module = inference.run(inference.Bench(), ("memory",))
    assert number(text.figure, " MB") < 5
    assert number(module.figure, " MB") < 50
