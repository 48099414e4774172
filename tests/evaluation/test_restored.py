"""Restored in context: what is counted as moved is moved, and a prompt that names two concepts follows the rule."""

from dataclasses import replace

import pytest

from sepme_diffusers import pocket
from sepme_diffusers.evaluation.pictures import erased, generate
from sepme_diffusers.evaluation.protocols.restored import RestoredRunner, bars, table
from sepme_diffusers.text.spelling import mentions


@pytest.fixture(scope="module")
def styles():
    return pocket.bank("styles").subset(["neon", "woodcut", "halftone"])


def test_the_shipped_styles_are_restored_in_every_wording(pocket_pipe, styles):
    found = RestoredRunner(pocket_pipe, "styles", each=15, pictures=6, seed=1, steps=4).measure(styles)
    assert (found.prompts, found.unmoved, found.movers) == (45, 45, {})
    assert (found.drawn, found.as_read) == (6, 6)
    assert bars([found])[0].met
    assert not pocket_pipe.erasable


def test_what_an_open_gate_moves_is_counted_and_named(pocket_pipe, styles):
    """A gate near zero opens for others' prompts; their pictures move as was read."""
    woodcut = styles["woodcut"]
    wide = replace(woodcut, increment=replace(woodcut.increment, gate=1e-6))
    runner = RestoredRunner(pocket_pipe, "styles", each=4, pictures=12, seed=1, steps=4)
    found = runner.measure(styles.with_entries([wide]))
    assert found.movers == {"neon moved by woodcut": 4, "halftone moved by woodcut": 4}
    assert (found.prompts, found.unmoved, found.drawn, found.as_read) == (12, 4, 12, 12)
    assert not bars([found])[0].met
    assert "neon moved by woodcut (4)" in table([found]).rows[0][-1]


def test_prompts_that_name_what_is_erased_are_left_out(pocket_pipe):
    bank = pocket.bank("objects").subset(["cat", "fox", "bus"])
    runner = RestoredRunner(pocket_pipe, "objects", each=30, pictures=1, seed=1, steps=1)
    for name in bank:
        others = [other for other in bank if other != name]
        prompts = runner.prompts(name, others)
        assert 20 < len(prompts) < 31
        assert not any(mentions(prompt, others) for prompt in prompts)


def test_a_prompt_with_an_erased_and_a_restored_concept_follows_the_erased_one_alone(pocket_pipe, styles):
    """The rule for mixed prompts: to the bit what a bank gives that never held the restored concept."""
    prompts = ["a woodcut and halftone fox", "a halftone fox, woodcut style"] * 2
    original = generate(pocket_pipe, prompts, 5, 8)
    with erased(pocket_pipe, styles, ["woodcut"]):
        mixed = generate(pocket_pipe, prompts, 5, 8)
    with erased(pocket_pipe, styles.subset(["woodcut"]), ["woodcut"]):
        alone = generate(pocket_pipe, prompts, 5, 8)
    assert [picture.tobytes() for picture in mixed] == [picture.tobytes() for picture in alone]
    assert all(now.tobytes() != before.tobytes() for now, before in zip(mixed, original, strict=True))
    likely, _ = pocket.classify(mixed)
    assert (likely.argmax(dim=1) != pocket.style_classes.index("woodcut")).all()
