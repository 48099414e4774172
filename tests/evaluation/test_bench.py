"""The benchmarks' measures: those that are quick at small size, and what the slow ones are made of."""

import copy
import re
import sys
from dataclasses import replace

import pytest
import torch

from sepme_diffusers import Concept, ConceptBank, SepMEConfig
from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.doors.linears import projection_shapes
from sepme_diffusers.evaluation.bench import (
    by_name,
    joint,
    keeping,
    many_concepts,
    overhead,
    processes,
    registry,
    shapes,
    solving,
    training_step,
)
from sepme_diffusers.evaluation.bench.denoising import plain_twin
from sepme_diffusers.evaluation.bench.measure import Figure, Measure
from sepme_diffusers.evaluation.bench.paper import PaperStep, null_space_by_elimination
from sepme_diffusers.evaluation.bench.runner import Runner, loaded
from sepme_diffusers.evaluation.bench.shapes import random_module
from sepme_diffusers.evaluation.bench.synthetic import synthetic_bank
from sepme_diffusers.making.kinds import find_kind, kind_names
from sepme_diffusers.making.kinds.wording import word_concept
from sepme_diffusers.text.concept import BLANK
from sepme_diffusers.text.encoding import encode, rows


def number(value: str, unit: str = " x") -> float:
    return float(value.removesuffix(unit))


@pytest.fixture
def runner(pipe) -> Runner:
    """A runner with a pocket-size model in the place of both its pipelines."""
    small = Runner(repeats=1)
    small.large = small.small = pipe
    return small


def test_every_measure_has_a_name_a_bar_and_a_baseline():
    assert {"switching", "disk_text", "guard_basis", "training_step", "hundred_concepts"} <= set(registry.MEASURES)
    for name, measure in registry.MEASURES.items():
        assert name == measure.name == measure.run.__name__
        assert measure.bar
        assert measure.baseline
        assert measure.run.__doc__


@pytest.mark.parametrize(
    "name", ["loop_50_of_50", pytest.param("loop_built_in", marks=pytest.mark.slow), "mixed_batch"]
)
def test_the_loop_is_timed_against_the_plain_pipeline(name, runner, pocket_pipe):
    if name == "loop_built_in":
        runner.small = pocket_pipe
    results = list(registry.run(runner, [name]))
    assert [measure.name for measure, _ in results] == [name] * len(results)
    assert all(number(figure.value) > 0 for _, figure in results)
    assert runner.large.get_bank() is None
    ((what, bar, value, baseline, _), *_) = registry.table(runner, results).rows
    assert what.startswith("denoising: ")
    assert (bar, baseline) == (registry.MEASURES[name].bar, "the plain pipeline with the same weights")
    assert value == results[0][1].value


def test_hooks_are_timed_in_a_pass_and_left_as_they_were(runner):
    """Text-side: the doors, the entry and two at the end; per module one more behind each Linear."""
    with loaded(runner.large, synthetic_bank(runner.large, 3, "text"), plain_pipelines="standing"):
        hooks = dict(runner.large.unet._forward_pre_hooks)
        with overhead.timed_hooks(runner, runner.large) as seconds, torch.no_grad():
            runner.large.set_erased(["c0", "c2"])
            edited = overhead.one_pass(runner, runner.large, runner.large.unet)().sample
        plain = overhead.one_pass(runner, runner.large, plain_twin(runner.large).unet)().sample
        assert not torch.equal(edited, plain)
        assert len(seconds) == 4
        assert min(seconds) > 0
        assert dict(runner.large.unet._forward_pre_hooks) == hooks
    text, module = (figure for _, figure in registry.run(runner, ["hooks_50_of_50"]))
    linears = len(projection_shapes(runner.large.unet))
    for figure, calls in ((text, 4), (module, 4 + linears)):
        assert 0 < number(figure.value, "") < 1
        assert f"in {calls} calls of hooks" in figure.detail
        first, later = (float(part.split()[-2]) for part in figure.detail.split(" in the ")[:2])
        assert min(first, later) > 0
    assert runner.large.get_bank() is None


def test_the_check_of_the_text_encoder_is_measured_with_as_many_guards_as_it_reads(runner):
    ((_, figure),) = registry.run(runner, ["text_check"])
    assert number(figure.value, " %") > 0
    every, first = (float(found) for found in re.findall(r"([0-9.]+) ms in", figure.detail))
    assert 0 < every < first
    assert "(16 prompts encoded)" in figure.detail


def test_a_joint_step_is_timed_against_steps_of_each(pocket_pipe):
    small = Runner(repeats=1)
    small.small = pocket_pipe
    figure = joint.joint_steps(small, ["neon", "pencil"], 1)
    assert 0 < number(figure.value) < 2
    assert figure.what == "a joint step of 2 concepts at batch 1"


def test_ten_thousand_concepts_are_made_when_that_is_asked_for(monkeypatch, tmp_path):
    """Few of them here, with few tokens; a run of everything leaves the measure out."""
    taken = many_concepts.make_many(24, str(tmp_path), n_tokens=8, d=64)
    bank = ConceptBank.from_pretrained(tmp_path / "bank")
    assert list(bank) == [f"concept {number}" for number in range(24)]
    entry = bank["concept 7"]
    assert entry.increment.is_compact
    assert entry.increment.rank == 1
    assert entry.metrics["regular_reading"] < entry.increment.gate < entry.metrics["own_reading"]
    assert len(entry.guards) == 24
    assert bank.guarantees[""].exact
    made, held = many_concepts.figures(24, taken)
    assert number(made.value, " min") >= 0
    assert number(held.value, " GB") > 0
    asked = []
    monkeypatch.setattr(registry, "_rows", lambda runner, measures, on_measure: asked.extend(measures))
    registry.run(Runner())
    assert asked
    assert many_concepts.ten_thousand_making not in asked
    registry.run(Runner(), ["ten_thousand_making"])
    assert asked[-1] is many_concepts.ten_thousand_making


def test_unknown_measures_are_refused():
    with pytest.raises(ValueError, match=r"unknown measures \['speed'\]; there are .*'switching'"):
        registry.run(Runner(), ["speed"])


def test_figures_come_one_by_one(monkeypatch):
    """What was measured before a measure that fails is not lost."""

    def failing(_):
        yield Figure("first", "1 x", "")
        raise RuntimeError("out of memory")

    monkeypatch.setitem(registry.MEASURES, "failing", Measure("failing", "", "", failing))
    started = []
    figures = registry.run(Runner(), ["failing"], started.append)
    assert next(figures)[1].value == "1 x"
    assert started == ["failing"]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(figures)


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


def test_elimination_says_what_was_timed():
    guard = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    figure = solving.against_elimination(Runner(repeats=1), guard[:3], guard)
    assert number(figure.value) > 0
    assert figure.detail.startswith("3 x 40 tokens")
    assert "6 x 40 of nine concepts" in figure.detail


def test_the_papers_step_lowers_its_loss_and_leaves_both_models_as_they_were(pipe):
    torch.manual_seed(0)
    edited = copy.deepcopy(pipe.unet)
    before = {name: tensor.clone() for name, tensor in edited.state_dict().items()}
    concept, blank = encode(pipe, ["neon cat"]), encode(pipe, [BLANK])
    config = SepMEConfig.paper(beta=0.02)
    act = PaperStep(pipe.unet, edited, null_space(rows(blank)), concept, blank, config)
    noisy, at = training_step.noisy_picture(pipe)
    losses = [act(noisy, at) for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]
    for unet in (edited, pipe.unet):
        assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
        assert all(not module._forward_hooks for module in unet.modules())
    assert all(parameter.grad is None for parameter in edited.parameters())


def test_the_papers_first_loss_is_that_of_the_original(pipe):
    """Unedited, the correlation is the mean square of r_c; the blank prompt's prediction never moves."""
    act = training_step.paper_step(pipe, copy.deepcopy(pipe.unet), as_coded=False)
    noisy, at = training_step.noisy_picture(pipe)
    with torch.no_grad():
        with_concept, without = (pipe.unet(noisy, at, encode(pipe, [text])).sample for text in ("cat", BLANK))
    assert act(noisy, at) == pytest.approx(float((with_concept - without).square().mean()), rel=1e-4)


def test_the_authors_step_computes_gradients_of_all_weights(pipe):
    edited = copy.deepcopy(pipe.unet)
    training_step.paper_step(pipe, edited, as_coded=True)(*training_step.noisy_picture(pipe))
    assert sum(parameter.grad is not None for parameter in edited.parameters()) > 50


def test_the_authors_step_checkpoints_residual_blocks_and_finds_the_same_gradients(pipe):
    """What is computed twice is the residual blocks alone, and it changes neither loss nor coefficients."""
    runs, noisy_picture = {}, training_step.noisy_picture(pipe)
    for as_coded in (False, True):
        edited, passes = copy.deepcopy(pipe.unet), {"ResnetBlock2D": 0, "BasicTransformerBlock": 0}
        for module in edited.modules():
            if (kind := type(module).__name__) in passes:
                module.register_forward_pre_hook(lambda *_, k=kind, p=passes: p.update({k: p[k] + 1}))
        step = training_step.paper_step(pipe, edited, as_coded)
        losses = [step(*noisy_picture) for _ in range(2)]
        runs[as_coded] = (losses, step.coefficients, passes)
    (plain, kept, once), (coded, again, twice) = runs.values()
    assert plain == pytest.approx(coded, rel=1e-4)
    assert all(torch.allclose(kept[name], again[name], atol=1e-3) for name in kept)
    assert twice["ResnetBlock2D"] > 1.5 * once["ResnetBlock2D"]  # all but the first in the middle, by diffusers
    assert twice["BasicTransformerBlock"] == once["BasicTransformerBlock"]


def test_a_training_step_takes_turns_with_the_papers(runner):
    before = {name: tensor.clone() for name, tensor in runner.large.unet.state_dict().items()}
    figures = training_step.step_times(runner)
    new, mean = "time of a training step, with new noise, ", "time of a training step, mean of the 4 on a batch, "
    assert [figure.what for figure in figures] == [
        f"{ours}against {theirs}" for ours in (new, mean) for theirs in training_step.PAPERS_STEPS.values()
    ]
    assert all(number(figure.value) > 0 for figure in figures)
    assert all(torch.equal(t, before[name]) for name, t in runner.large.unet.state_dict().items())


def test_calls_take_turns():
    order = []
    taken = Runner().take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 3, "b": 3}


@pytest.mark.slow
def test_a_peak_does_not_start_from_that_of_the_process_that_asks():
    held = torch.ones(150_000_000)  # 600 MB
    here = processes.peak_resident()
    there = processes.alone(processes.peak_resident)
    assert there < here - held.nbytes / 2


def test_the_peak_of_this_process_counts_what_it_held():
    before = processes.peak_resident()
    held = torch.ones(int(1.1 * before) // 4)
    assert processes.peak_resident() > before + held.nbytes / 2


def test_many_concepts_are_compared_with_one_fused_edit(runner):
    figure = solving.closed_forms(runner, ["cat", "dog", "fox"])
    assert figure.what == "closed form of 3 concepts"
    assert number(figure.value) > 0
    assert "encoding the 4 prompts once" in figure.detail


def test_steps_to_the_stopping_rule_are_counted(runner, monkeypatch):
    """On an untrained model, with few prompts: the count is the trainer's, and stopping by the rule is told apart."""
    monkeypatch.setattr(solving, "_REGULAR", ())
    monkeypatch.setattr(solving, "BANKED_STYLES", ("neon", "woodcut"))
    few = {"n_images": 1, "batch_size": 1, "image_steps": 1, "max_steps": 12}
    paper = SepMEConfig.paper
    monkeypatch.setattr(SepMEConfig, "paper", lambda **settings: paper(**(few | settings)))
    ours = SepMEConfig.linear(solver="train", tolerance=0.9, **few)
    steps, seconds = solving.stopping_steps(runner, ["neon"], ours)
    assert 0 < number(steps.value) < 13
    assert 0 < number(seconds.value) < 13
    assert steps.detail.split(": ")[1].startswith("neon 12")


def test_a_concept_on_disk_is_measured_in_both_forms(runner):
    """Compact, a concept takes less than with A in float32, and much less than a LoRA with A in every module."""
    figures = [figure for _, figure in registry.run(runner, ["disk_text", "disk_module"])]
    for figure, most in zip(figures, (0.7, 0.3), strict=True):
        wide = float(figure.detail.rpartition(": ")[2].removesuffix(" KB"))
        assert 0 < number(figure.value, " KB") < most * wide


def test_adapters_are_measured_beside_a_bank_without_them(runner):
    [(_, figure)] = registry.run(runner, ["adapters"])
    seconds, megabytes = (float(part.split()[0]) for part in figure.value.split(", "))
    assert 0 < seconds < 1
    assert 0.001 < megabytes < 1


def test_switching_and_memory_are_measured_and_nothing_stays_loaded(runner):
    figures = {figure.what: figure for _, figure in registry.run(runner, ["switching", "memory"])}
    assert number(figures["switching the erased set"].value) > 1
    assert 0 < number(figures["memory of 100 concepts, text form"].value, " MB") < 5
    assert runner.large.get_bank() is None
    assert not getattr(runner.large.unet, "peft_config", {})


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
    text, module = (figure for _, figure in registry.run(Runner(), ["memory"]))
    assert number(text.value, " MB") < 5
    assert number(module.value, " MB") < 50


def test_what_a_user_names_is_timed_from_nothing_kept(pipe, monkeypatch, tmp_path):
    """At small size; the second concept takes no regular prompts to encode, and another process finds them."""
    encoders = type(pipe)(**{**pipe.components, "unet": None})
    monkeypatch.setattr(by_name, "sd15_text_shape", lambda dtype: encoders)
    monkeypatch.setenv("SEPME_CACHE", "")
    taken = by_name.erase_named(str(tmp_path), [by_name.FIRST, by_name.SECOND], regular=100)
    assert 0 < taken[by_name.SECOND] < taken[by_name.FIRST]
    kept = {file.name for file in tmp_path.iterdir()}
    assert len(kept) == 2  # regular prompts, and names of styles
    later = by_name.erase_named(str(tmp_path), [by_name.IN_ANOTHER_PROCESS], regular=100)
    assert {file.name for file in tmp_path.iterdir()} == kept
    second, memory = by_name.figures(taken, later)
    assert number(second.value, " s") >= 0
    assert "of them to calibrate by" in second.detail
    assert number(memory.value, " GB") >= 0


def test_the_shape_of_text_alone_reads_every_template_of_the_kinds():
    tokenizer = shapes.tokenizer_of_words()
    for name in kind_names():
        kind = find_kind(name)
        worded = word_concept(Concept(next(iter(kind.known)), kind=name), kind, tokenizer)
        assert worded.left_out == {}
        assert len(worded.concept.pairs) >= 100


def test_saving_and_verifying_a_bank_of_many_is_measured():
    (disk,), (verified,) = list(keeping.saving(50)), list(keeping.verifying(50))
    assert 0.1 < number(disk.value, " MB") < 1
    assert "writes 3 files" in disk.detail  # a shard, the manifest and the card
    assert number(verified.value, " s") >= 0
    assert "0 faults" in verified.detail


@pytest.mark.slow
def test_loading_a_bank_of_many_is_measured_in_a_process_of_its_own():
    for measured in (keeping.loading, keeping.loading_two):
        (loaded,) = measured(50, 2)
        assert number(loaded.value, " s") >= 0
        assert re.fullmatch(r"the median of 2; \d MB at most", loaded.detail)


def test_what_takes_long_runs_where_it_is_named_alone(runner, monkeypatch):
    asked = {name for name, measure in registry.MEASURES.items() if measure.on_request}
    assert {"ten_thousand_loading", "two_of_ten_thousand"} <= asked
    started = []
    idle = {name: replace(measure, run=lambda runner: iter(())) for name, measure in registry.MEASURES.items()}
    monkeypatch.setattr(registry, "MEASURES", idle)
    list(registry.run(runner, on_measure=started.append))
    assert started == [name for name in idle if name not in asked]
