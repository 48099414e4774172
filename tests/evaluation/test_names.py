"""What a user types: draws, the search over text, and what is measured of one draw."""

from itertools import chain

import pytest
from typer.testing import CliRunner

from sepme_diffusers import pocket
from sepme_diffusers.cli.app import app
from sepme_diffusers.evaluation.probes import DOUBLED, PARAPHRASES, WORDINGS
from sepme_diffusers.evaluation.protocols.erasures import KIND_OF
from sepme_diffusers.evaluation.protocols.names import ADAPTERS, NAMES, Draw, NamesRunner, Result, bars, draws, table
from sepme_diffusers.evaluation.protocols.text_search import hidden_prompts
from sepme_diffusers.making.kinds.registry import find_kind
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.text.encoding import encode
from sepme_diffusers.text.spelling import spells

KINDS = tuple(KIND_OF)


@pytest.mark.parametrize("kind", KINDS)
def test_six_of_all_are_drawn_by_the_seed(kind):
    own = {"styles": pocket.styles, "objects": pocket.objects}[kind]
    some = draws(kind, 3, 5)
    assert some == draws(kind, 3, 5) != draws(kind, 4, 5)
    assert all(len(set(draw.names)) == 6 and set(draw.names) <= set(own) for draw in some)
    assert draws(kind, 3, 2) == some[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_odd_wordings_are_in_no_kind_and_in_no_other_list(kind, pocket_pipe):
    slot = kind.removesuffix("s")
    own = {template.prompt.replace("{name}", f"{{{slot}}}") for template in find_kind(slot, pocket_pipe).templates}
    own = {prompt.replace("{subject}", "{object}") for prompt in own}
    others = set(chain(words.HELD_OUT_TEMPLATES, PARAPHRASES, own))
    assert not others & set(WORDINGS[kind])
    assert not others & set(DOUBLED[kind])
    assert all(f"{{{slot}}}" in wording for wording in WORDINGS[kind])
    assert all(doubled.count(f"{{{slot}}}") == 2 for doubled in DOUBLED[kind])


@pytest.mark.parametrize(("kind", "name"), [("styles", "neon"), ("objects", "cat")])
def test_what_is_searched_opens_no_gate(kind, name, pocket_pipe):
    entry = pocket.bank(kind)[name]
    found = hidden_prompts(pocket_pipe, entry, kind)
    assert 0 < len(found) <= 8
    assert not any(spells(prompt, [name]) for prompt in found)
    assert entry.increment.reading(encode(pocket_pipe, found)).max() < entry.increment.gate


def test_a_draw_is_measured_by_names(pocket_pipe):
    runner, draw = NamesRunner(pocket_pipe, 0, 1, 2), Draw("styles", ("neon", "woodcut", "pencil"))
    result = runner.measure(draw, NAMES)
    assert result.figures["regular: ACC, of the original's %"] == pytest.approx(100)
    assert result.figures["not erased: perceptual distance"] == 0
    assert result.figures["restored, four active: equal to the bit %"] == 100
    assert {"erased, guidance 12: ACC %", "erased, doubled: ACC %", "wordings"} <= set(result.figures)
    assert pocket_pipe.get_bank() is None
    assert table([result]).rows[0][:2] == ("neon, woodcut, pencil", NAMES)


def test_the_worst_draw_counts_and_adapters_have_bars_of_their_own():
    draw = Draw("styles", ("neon",))
    good = {"erased: ACC %": 0.0, "regular: ACC, of the original's %": 100.0}
    worse = {"erased: ACC %": 11.0, "regular: ACC, of the original's %": 96.0}
    made = {bar.measure: bar for bar in bars([Result(draw, NAMES, good), Result(draw, NAMES, worse)])}
    assert [bar.met for bar in made.values()] == [False, False]
    assert made["styles by names: erased: ACC %"].measured == "11.0"
    adapters = {bar.measure: bar.met for bar in bars([Result(draw, ADAPTERS, worse)])}
    assert adapters == {
        f"styles by {ADAPTERS}: erased: ACC %": False,
        f"styles by {ADAPTERS}: regular: ACC, of the original's %": True,
    }


def test_free_wordings_are_counted_over_all_draws():
    """One of ten and none of ninety are one of a hundred."""
    some = [
        Result(Draw("objects", ("cat",)), NAMES, {"wordings": n, "wordings that still show it %": share})
        for n, share in ((10.0, 10.0), (90.0, 0.0))
    ]
    (bar,) = bars(some)
    assert (bar.measure, bar.bar) == ("objects by names, all draws: wordings that still show it %", "<= 2")
    assert (bar.measured, bar.met) == ("1.0 of 100", True)


def test_unknown_descriptions_are_refused_with_the_known_ones():
    shown = CliRunner().invoke(app, ["eval", "names", "--only", "rumours"])
    assert shown.exit_code == 2
    assert "rumours" in shown.output
    assert NAMES in shown.output
