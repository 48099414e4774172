"""The evaluation's increments: made from names by the defaults alone, from nothing that it judges by."""

from collections.abc import Iterator
from itertools import chain

import pytest
import torch

from sepme_diffusers import SepMETrainer, pocket
from sepme_diffusers.evaluation.probes import Kind
from sepme_diffusers.evaluation.protocols.erasures import (
    GUARDS,
    KIND_OF,
    concepts_of,
    erase_names,
    preserved_prompts,
    without_gates,
)
from sepme_diffusers.evaluation.protocols.scenes import CONCEPTS, NEVER_SEEN, REGULAR, cells
from sepme_diffusers.making.kinds.registry import find_kind
from sepme_diffusers.making.regular import lexicon_of, regular_prompts
from sepme_diffusers.pocket import vocabulary as words

KINDS = tuple(KIND_OF)
SECOND_NAMES = {second for table in (words.STYLES, words.OBJECTS) for second in table.values() if second}


def seen_prompts(pipe, kind: Kind) -> Iterator[str]:
    """Every prompt that making the scenes' increments reads, but for guarded names."""
    lexicon = lexicon_of(pipe)
    neighbours = lexicon.names(find_kind(KIND_OF[kind], pipe).neighbours)
    for concept in concepts_of(pipe, kind, dict.fromkeys((*CONCEPTS[kind][: REGULAR.start], *neighbours))):
        yield from chain(*concept.pairs, *concept.anchors)
    yield from chain(*regular_prompts(lexicon, 3000))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_is_read_is_drawn_nor_a_second_name_nor_what_is_never_seen(kind, pocket_pipe):
    seen = set(seen_prompts(pocket_pipe, kind))
    said = set(chain.from_iterable(prompt.replace(",", " ").split() for prompt in seen))
    assert not said & SECOND_NAMES
    assert not said & set(NEVER_SEEN[kind])
    drawn = [cell for cell in cells(kind, 24, 0) if cell.role != "regular, plain objects"]
    assert not seen & {prompt for cell in drawn for prompt in cell.probe.prompts}


def test_styles_are_judged_on_objects_that_their_prompts_do_not_have(pocket_pipe):
    kind = find_kind("style", pocket_pipe)
    assert not set(kind.words["subject"]) & set(words.TEST_OBJECTS)


def test_increments_are_those_of_the_plain_call(pocket_pipe):
    bank = erase_names(pocket_pipe, "styles", ["neon"], others=["woodcut"])
    plain = SepMETrainer(pocket_pipe, guards=GUARDS, others=["woodcut"]).erase(["neon"], kind="style")
    assert torch.equal(bank["neon"].increment.A, plain["neon"].increment.A)
    assert bank["neon"].guards == plain["neon"].guards
    assert bank["neon"].increment.gate is not None
    linear = without_gates(bank)["neon"]
    assert linear.increment is bank["neon"].adapter
    assert linear.increment.gate is None
    assert without_gates(without_gates(bank))["neon"].increment is linear.increment


def test_baselines_get_the_trainers_prompts_and_regular_ones_that_name_nothing_erased(pocket_pipe):
    [neon] = concepts_of(pocket_pipe, "styles", ["neon"])
    assert all("neon" in prompt and "neon" not in without for prompt, without in neon.pairs)
    assert len(neon.pairs) > 50
    preserved = preserved_prompts(pocket_pipe, ["neon", "cat"])
    assert len(preserved) > 800
    assert not {"neon", "cat"} & set(chain.from_iterable(prompt.replace(",", " ").split() for prompt in preserved))


@pytest.mark.parametrize("name", ["styles", "objects"])
def test_shipped_banks_are_gated_and_made_from_names(name):
    bank = pocket.bank(name)
    assert {entry.concept.kind for entry in bank.values()} == {KIND_OF[name]}
    assert not any(entry.concept.pairs for entry in bank.values())
    assert all(entry.increment.gate is not None for entry in bank.values())
