"""Prompts of the evaluation: none that an edit saw, each another one, and pictures drawn once."""

import pytest

from sepme_diffusers import pocket
from sepme_diffusers.evaluation.pictures import PictureCache
from sepme_diffusers.evaluation.probes import PARAPHRASES, pairs_probe, plain_probe, probe
from sepme_diffusers.evaluation.protocols.scenes import cells
from sepme_diffusers.pocket import vocabulary as words

KINDS = ("styles", "objects")


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_has_a_prompt_and_a_seed_of_its_own_for_every_picture(kind):
    asked = cells(kind, 24, 7)
    for cell in asked:
        assert len(set(cell.probe.prompts)) == len(cell.probe.prompts) == len(cell.probe.styles)
        assert len(cell.probe.objects) == len(cell.probe.seeds)
    seeds = [seed for cell in asked for seed in cell.probe.seeds]
    assert len(set(seeds)) == len(seeds)


def test_more_pictures_begin_with_the_fewer():
    """So that pictures drawn for the scenes serve the bars as well."""
    few, more = (probe("styles", "neon", n, 3) for n in (5, 70))
    assert more.cases[:5] == few.cases
    assert len(set(more.prompts)) == 70
    assert {cell.probe.cases[0] for cell in cells("objects", 8, 0)} == {
        cell.probe.cases[0] for cell in cells("objects", 24, 0)
    }


def test_other_words_name_the_same_thing():
    second = probe("styles", "neon", 4, 0, word="glowing")
    assert all("glowing" in prompt and "neon" not in prompt for prompt in second.prompts)
    assert set(second.styles) == {"neon"}
    known = words.PAIR_TEMPLATES + words.STYLE_TEMPLATES + words.OBJECT_TEMPLATES + words.HELD_OUT_TEMPLATES
    assert not set(PARAPHRASES) & set(known)


def test_pairs_are_spread_and_plain_objects_differ():
    pairs = pairs_probe(pocket.styles, pocket.objects, words.HELD_OUT_TEMPLATES, 1320, 0)
    assert len(set(zip(pairs.styles, pairs.objects, strict=True))) == 1320
    assert len(set(plain_probe(55, 0).objects)) == 55
    assert set(plain_probe(3, 0, ["cat", "dog"]).objects) == {"cat", "dog"}


def test_a_picture_is_drawn_once_for_each_erased_set(pocket_pipe):
    calls = []

    class Counting:
        def __getattr__(self, name):
            return getattr(pocket_pipe, name)

        def __call__(self, prompts, **kwargs):
            calls.append(len(prompts))
            return pocket_pipe(prompts, **kwargs)

    cache, asked = PictureCache(Counting(), steps=1), probe("styles", "neon", 2, 0)
    bank = pocket.bank("styles").subset(["neon", "pencil"])
    first = cache.draw([asked, asked])
    pocket_pipe.load_sepme(bank)
    try:
        assert cache.draw([asked])[0] == first[0] == first[1]
        pocket_pipe.set_erased(["neon"])
        erased = cache.draw([asked])[0]
        pocket_pipe.set_erased(["pencil", "neon"])
        cache.draw([asked])
        pocket_pipe.set_erased(["neon"])
        assert cache.draw([asked])[0] == erased
    finally:
        pocket_pipe.unload_sepme()
    assert erased != first[0]
    assert calls == [2, 2, 2]
