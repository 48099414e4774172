"""Half of all objects beside a fused edit, and sixes of a bank of any_six."""

from itertools import chain

import pytest
import torch

from sepme_diffusers import pocket
from sepme_diffusers.evaluation.baselines.uce import replaced
from sepme_diffusers.evaluation.protocols import any_six, half_of_all
from sepme_diffusers.evaluation.protocols.any_six import Draw, Six, draws, six_bars
from sepme_diffusers.evaluation.protocols.half_of_all import (
    HALF,
    REST,
    HalfOfAll,
    Halves,
    half_bars,
    half_probes,
    harmonic_mean,
)
from sepme_diffusers.evaluation.protocols.scenes import built_in
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.pocket.concepts import regular_prompts


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
        assert not set(chain.from_iterable(map(regular_prompts, names))) & set(probe.prompts)
    assert not set(test[0].seeds) & set(test[1].seeds)


def test_the_baseline_chooses_on_prompts_that_it_is_not_judged_by(pocket_pipe):
    half = HalfOfAll(pocket_pipe, 0, 4, 1)
    assert not {p for probe in half.test for p in probe.prompts} & {p for probe in half.choice for p in probe.prompts}
    assert not {s for probe in half.test for s in probe.seeds} & {s for probe in half.choice for s in probe.seeds}


def test_one_of_many_is_restored_to_the_bit(pocket_pipe, monkeypatch):
    monkeypatch.setattr(half_of_all, "HALF", ("cat", "bus", "rose", "key"))
    half = HalfOfAll(pocket_pipe, 0, 1, 1)
    bank = pocket.bank("objects").subset(half_of_all.HALF)
    assert half.restored_change(bank, built_in()) == 0
    assert pocket_pipe.get_bank() is None


def test_replaced_weights_are_put_back_to_the_bit(pocket_pipe):
    name, weight = next((n, p) for n, p in pocket_pipe.unet.named_parameters() if "attn2.to_k" in n)
    before = weight.detach().clone()
    with replaced(pocket_pipe.unet, {name: before + 1}):
        assert torch.equal(weight, before + 1)
    assert torch.equal(weight, before)


def test_bars_of_the_halves():
    made = half_bars(Halves("ours", 5, 95), Halves("UCE", 5, 94), 0)
    assert [bar.met for bar in made] == [True, True, True]
    assert [bar.met for bar in half_bars(Halves("ours", 10, 92), Halves("UCE", 5, 94), 1)] == [False] * 3


def test_sixes_are_drawn_by_the_seed_and_their_probes_fit():
    assert draws(3, 2) == draws(3, 2) != draws(4, 2)
    assert [len(draw.names) for draw in draws(3, 2)] == [6] * 6
    for draw in draws(3, 2):
        probes = any_six.Everything(None, 0, 12, 20).probes(draw)
        assert set(probes.get("style", probes["regular"]).styles) >= set(draw.styles)
        assert not set(probes["regular"].styles) & set(draw.styles)
        assert not (set(probes["regular"].objects) | set(probes["plain"].objects)) & set(draw.objects)


def test_the_worst_six_counts():
    draw = Draw("six styles", pocket.styles[:6], ())
    good = Six(draw, (0, 100), (99, 100), (100, 100), 0.01, 0)
    assert all(bar.met for bar in six_bars([good, good]))
    bad = Six(draw, (11, 100), (97, 100), (98, 100), 0.06, 2)
    assert not any(bar.met for bar in six_bars([good, bad]))
