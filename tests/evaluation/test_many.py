"""Half of all objects beside a baseline, and any six of one bank of all objects and styles."""

import pytest
import torch

from sepme_diffusers import pocket
from sepme_diffusers.evaluation.baselines.baseline import Baseline, replaced
from sepme_diffusers.evaluation.baselines.registry import BASELINES
from sepme_diffusers.evaluation.pictures import built_in
from sepme_diffusers.evaluation.protocols import half_of_all
from sepme_diffusers.evaluation.protocols.any_six import AnySixRunner, Selection, SixErased, selections, six_bars
from sepme_diffusers.evaluation.protocols.erasures import concepts_of
from sepme_diffusers.evaluation.protocols.half_of_all import (
    HALF,
    REST,
    HalfErased,
    HalfOfAllRunner,
    half_bars,
    half_probes,
    harmonic_mean,
)
from sepme_diffusers.pocket import vocabulary as words


def test_harmonic_mean_of_what_is_gone_and_what_is_left():
    assert harmonic_mean(0, 100) == 1
    assert harmonic_mean(100, 100) == harmonic_mean(0, 0) == harmonic_mean(100, 0) == 0
    assert harmonic_mean(20, 60) == pytest.approx(2 * 0.8 * 0.6 / 1.4)


def test_the_halves_are_all_objects_in_templates_and_styles_that_no_edit_saw():
    assert len(HALF) >= 50
    assert sorted(HALF + REST) == sorted(pocket.objects)
    test = half_probes(words.UNBANKED_STYLES, words.HELD_OUT_TEMPLATES, 4, 0)
    for names, probe in zip((HALF, REST), test, strict=True):
        assert len(set(probe.prompts)) == len(probe.prompts) == 4 * len(names)
        assert set(probe.objects) == set(names)
    assert not set(test[0].seeds) & set(test[1].seeds)


def test_the_baseline_chooses_on_prompts_that_it_is_not_judged_by(pocket_pipe):
    half = HalfOfAllRunner(pocket_pipe, 0, 4, 1)
    assert not {p for probe in half.test for p in probe.prompts} & {p for probe in half.choice for p in probe.prompts}
    assert not {s for probe in half.test for s in probe.seeds} & {s for probe in half.choice for s in probe.seeds}


def test_one_of_many_is_restored_to_the_bit(pocket_pipe, monkeypatch):
    monkeypatch.setattr(half_of_all, "HALF", ("cat", "bus"))
    monkeypatch.setattr(half_of_all, "_RESTORED_ONE_BY_ONE", 1)
    monkeypatch.setattr(half_of_all, "_FEW_STEPS", 2)
    half = HalfOfAllRunner(pocket_pipe, 0, 1, 1)
    bank = pocket.bank("objects").subset(half_of_all.HALF)
    assert half.restored_change(bank, built_in()) == 0
    assert pocket_pipe.get_bank() is None


def test_a_baseline_is_judged_by_its_best_settings(pocket_pipe, monkeypatch):
    """A baseline that leaves the model as it is has the original's accuracies whatever it is given."""
    monkeypatch.setattr(half_of_all, "HALF", ("cat",))
    monkeypatch.setattr(half_of_all, "REST", ("bus",))
    runner = HalfOfAllRunner(pocket_pipe, 0, 1, 1)
    idle = Baseline(
        "idle", "nowhere", lambda pipe, concepts, preserved, strength: {}, ({"strength": 1}, {"strength": 2})
    )
    names = []
    chosen, tries = runner.baseline(idle, names.append)
    original = runner.original()
    assert names == [attempt.name for attempt in tries] == ["idle, strength 1", "idle, strength 2"]
    assert (chosen.erased, chosen.kept) == (original.erased, original.kept)


def test_every_baseline_has_a_reference_and_changes_weights_that_there_are(pocket_pipe):
    concepts, parameters = concepts_of(pocket_pipe, "styles", ["neon"]), dict(pocket_pipe.unet.named_parameters())
    for name, baseline in BASELINES.items():
        assert baseline.name == name
        assert baseline.reference
        for settings in baseline.choices[:1]:
            weights = baseline.edit(pocket_pipe, concepts, ["a cat"], **settings)
            assert {key: weight.shape for key, weight in weights.items()} == {
                key: parameters[key].shape for key in weights
            }
            assert any(not torch.equal(weight, parameters[key]) for key, weight in weights.items())


def test_replaced_weights_are_put_back_to_the_bit(pocket_pipe):
    name, weight = next((n, p) for n, p in pocket_pipe.unet.named_parameters() if "attn2.to_k" in n)
    before = weight.detach().clone()
    with replaced(pocket_pipe.unet, {name: before + 1}):
        assert torch.equal(weight, before + 1)
    assert torch.equal(weight, before)


def test_bars_of_the_halves():
    made = half_bars(HalfErased("ours", 5, 95), HalfErased("UCE", 5, 94), 0)
    assert [bar.met for bar in made] == [True, True, True]
    assert [bar.met for bar in half_bars(HalfErased("ours", 10, 92), HalfErased("UCE", 5, 94), 1)] == [False] * 3


def test_sixes_are_drawn_by_the_seed_and_their_probes_fit():
    assert selections(3, 2) == selections(3, 2) != selections(4, 2)
    assert [len(selection.names) for selection in selections(3, 2)] == [6] * 6
    for selection in selections(3, 2):
        probes = AnySixRunner(None, 0, 12, 20).probes(selection)
        assert set(probes.get("style", probes["regular"]).styles) >= set(selection.styles)
        assert not set(probes["regular"].styles) & set(selection.styles)
        assert not (set(probes["regular"].objects) | set(probes["plain"].objects)) & set(selection.objects)


def test_the_worst_six_counts():
    six = Selection("six styles", pocket.styles[:6], ())
    good = SixErased(six, (0, 100), (99, 100), (100, 100), 0.01, 0)
    assert all(bar.met for bar in six_bars([good, good]))
    bad = SixErased(six, (11, 100), (97, 100), (98, 100), 0.06, 2)
    assert not any(bar.met for bar in six_bars([good, bad]))
