"""`pipe.explain`: what it says of a prompt is what a call with this prompt does."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import ConceptBank, ErasureNotInForce, SepMETrainer, UnknownConceptError, pocket
from sepme_diffusers.bank.disk.store import Store
from sepme_diffusers.text.encoding import encode
from small import CLOSED, CONCEPTS, latents, random_pipeline, random_xl_pipeline, wide

SHUT, OWN = 1e6, 0.7
# Spells neon; reads as it does, and spells nothing else; spells pencil by an alias; reads nothing; something else.
PROMPTS = ["neon dog", "a cat in the style of neon", "a crayon drawing", "", "a picture of a fox"]


def gated(entry, gate, door=None):
    """An entry with a gate: everywhere, or at one door."""
    doors = {
        name: replace(part, gate=gate) if door in (None, name) else part
        for name, part in entry.increment.doors.items()
    }
    own = gate if door in (None, "tokens") else entry.increment.gate
    return replace(entry, increment=replace(entry.increment, gate=own, doors=doors))


def with_gates(bank: ConceptBank, pipe) -> ConceptBank:
    """neon's gate opens to nothing read, that of its twin to what its own prompts read; cat has none."""
    neon, cat, pencil = (bank[name] for name in ("neon", "cat", "pencil"))
    own = encode(pipe, neon.concept.prompts)
    reached = OWN * float(neon.increment.reading(own).min())
    crayon = replace(pencil.concept, aliases=("crayon",))
    entries = [
        gated(neon, SHUT),
        gated(neon.renamed("glow"), reached),
        cat,
        gated(replace(pencil, concept=crayon), SHUT),
    ]
    others = [gated(bank[name], reached) for name in bank if name not in ("neon", "cat", "pencil")]
    return replace(bank.subset([]).with_entries([*entries, *others]), denoiser=None)


@pytest.fixture(scope="module")
def xl_bank():
    return SepMETrainer(random_xl_pipeline(), replace(CLOSED, gain=1.0, reserve=0.1), ["watermark"]).erase(CONCEPTS)


@pytest.fixture
def loaded(pipe, text_bank):
    """The pipeline with gated and ungated text-side increments."""
    pipe.load_sepme(with_gates(text_bank, pipe))
    return pipe


def refuse_other_deeds(pipe):
    """Check for every prompt and concept that a call does what is said."""
    explanation, before = pipe.explain(PROMPTS), latents(pipe, PROMPTS, erased=[])
    assert [reading.prompt for reading in explanation.prompts] == PROMPTS
    said = {}
    for name in pipe.erasable:
        after = latents(pipe, PROMPTS, erased=[name])
        moved = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
        said[name] = [reading[name].acts for reading in explanation.prompts]
        assert said[name] == moved, name
        for reading, opened in zip(explanation.prompts, pipe.last_call.opened, strict=True):
            doors = [door for door in reading[name].doors if door.gate is not None]
            assert opened == ({name: any(door.open for door in doors)} if doors else {})
    return said


def test_text_side_increments_act_where_it_is_said(loaded):
    said = refuse_other_deeds(loaded)
    assert said["neon"] == [True, True, False, False, False]  # spelled
    assert said["glow"][1:4:2] == [True, False]  # read, though it is not spelled
    assert said["pencil"] == [False, False, True, False, False]  # spelled by an alias
    assert said["cat"] == [True, True, True, False, True]  # no gate


def test_per_module_increments_act_where_it_is_said(pipe, mixed_bank):
    bank = with_gates(mixed_bank, pipe)
    pipe.load_sepme(bank.with_entries([gated(bank["woodcut"], SHUT), bank["woodcut"].renamed("carving")]))
    assert refuse_other_deeds(pipe)["woodcut"] == [False] * len(PROMPTS)
    assert pipe.explain("a woodcut cat", ["woodcut"]).prompts[0]["woodcut"].acts


@pytest.mark.parametrize("door", ["tokens", "pooled"])
def test_each_door_has_a_reading_and_a_gate_of_its_own(xl_bank, door):
    """A gate that is shut at one door leaves the other one as it is."""
    pipe = random_xl_pipeline()
    pipe.load_sepme(xl_bank.with_entries([gated(xl_bank["neon"], SHUT, door), gated(xl_bank["pencil"], SHUT)]))
    said = refuse_other_deeds(pipe)
    assert said["neon"] == [True, True, True, False, True]
    assert said["pencil"] == [False] * len(PROMPTS)
    (reading,) = pipe.explain("a picture of a fox", ["neon"]).prompts
    doors = {seen.door: seen for seen in reading["neon"].doors}
    assert list(doors) == ["tokens", "pooled"]
    assert {name: seen.acts for name, seen in doors.items()} == {"tokens": True, "pooled": True} | {door: False}
    assert doors["pooled"].word is None


def test_the_reading_is_that_of_the_increment(loaded):
    bank = loaded.get_bank()
    for reading in loaded.explain(PROMPTS).prompts:
        for name in bank:
            expected = float(bank[name].increment.reading(encode(loaded, [reading.prompt])))
            (door,) = reading[name].doors
            assert door.reading == pytest.approx(expected, rel=1e-6, abs=1e-5)
            assert door.gate == bank[name].increment.gate


@pytest.mark.parametrize(
    ("prompt", "word"), [("a fox in the style of neon", "neon"), ("a Neon fox", "Neon"), ("", None)]
)
def test_the_word_is_the_one_that_is_read_most(pocket_pipe, prompt, word):
    pocket_pipe.load_sepme(pocket.bank("styles"))
    try:
        neon = pocket_pipe.explain(prompt, ["neon"]).prompts[0]["neon"]
    finally:
        pocket_pipe.unload_sepme()
    assert neon.doors[0].word == word
    assert neon.spelled == (("neon",) if word else ())


def test_a_guard_reads_exactly_nothing_in_half_precision(text_bank):
    pipe = random_pipeline().to(torch.bfloat16)
    pipe.load_sepme(text_bank)
    assert float(text_bank["neon"].increment.reading(encode(pipe, ["watermark"]))) > 0
    for reading in pipe.explain(["watermark", ""]).prompts:
        assert [(concept.doors[0].reading, concept.acts) for concept in reading.concepts] == [(0.0, False)] * 3


def test_nothing_changes(loaded):
    """No random number is drawn, the denoiser does not run, and calls go on as before."""
    loaded.set_erased(["glow"])
    before, call, drawn = latents(loaded, PROMPTS), loaded.last_call, torch.get_rng_state()
    held = [tensor.data_ptr() for tensor in loaded._erasures().tensors()]
    passes = []
    hook = loaded.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    loaded.explain(PROMPTS)
    hook.remove()
    assert passes == []
    assert torch.equal(torch.get_rng_state(), drawn)
    assert loaded.last_call is call
    assert loaded.erased == ("glow",)
    assert [tensor.data_ptr() for tensor in loaded._erasures().tensors()] == held
    assert torch.equal(latents(loaded, PROMPTS), before)


def test_what_acts_comes_first_then_what_is_nearest_to_its_gate(loaded):
    for reading in loaded.explain(PROMPTS).prompts:
        ranks = [(concept.acts, concept.nearness) for concept in reading.concepts]
        assert ranks == sorted(ranks, reverse=True)
        assert len(ranks) == 4
        assert reading.rest == ""


def test_it_says_what_is_erased(loaded):
    loaded.replace_bank("bank", replace(loaded.get_bank(), always=("pencil",)), erased={"glow": 0.5})
    (reading,) = loaded.explain("neon dog").prompts
    assert {name: reading[name].strength for name in loaded.erasable} == {
        "neon": 0.0, "glow": 0.5, "cat": 0.0, "pencil": 1.0
    }  # fmt: skip
    assert [concept.concept for concept in reading.concepts if concept.always] == ["pencil"]
    assert "neon would act if erased (it is spelled)" in reading.sentence
    (of_request,) = loaded.for_request(always=["cat"], erased=[]).explain("neon dog").prompts
    assert {concept.concept for concept in of_request.concepts if concept.erased} == {"pencil", "cat"}


def test_banks_that_share_a_name_are_told_apart(loaded, text_bank):
    loaded.load_sepme(text_bank.subset(["neon"]), name="mine")
    (reading,) = loaded.explain("neon dog", ["mine/neon", "bank/neon"]).prompts
    assert reading["mine/neon"].doors[0].gate is None
    assert reading["bank/neon"].doors[0].gate == SHUT


def test_of_very_many_concepts_few_are_listed_and_read(text_bank, tmp_path, monkeypatch):
    """What is erased is listed first of all; the others are counted, and their numbers stay on the disk."""
    pipe = random_pipeline()
    names = ("neon", "cat", "pencil")
    bank = wide(with_gates(text_bank, pipe).subset(names), 100)
    bank.save_pretrained(tmp_path / "bank")
    pipe.load_sepme(tmp_path / "bank")
    read, names_read = Store.increment, []
    monkeypatch.setattr(Store, "increment", lambda store, name: (names_read.append(name), read(store, name))[1])
    (some,) = pipe.explain("neon 7 dog", limit=5).prompts
    assert sorted(names_read) == sorted(concept.concept for concept in some.concepts)
    assert (len(some.concepts), some.more_act, some.more_do_not) == (5, 103 - 5, 200)
    assert some.rest == "98 more act where they are erased, 200 do not"
    pipe.set_erased(["pencil 3"])
    (with_erased,) = pipe.explain("neon 7 dog", limit=5).prompts
    assert [concept.concept for concept in with_erased.concepts if concept.erased] == ["pencil 3"]
    (every,) = pipe.explain("neon 7 dog", limit=300).prompts
    assert every["neon 7"].spelled == ("neon 7",)
    nearest = [concept.nearness for concept in every.concepts[:5]]
    assert [concept.nearness for concept in some.concepts] == pytest.approx(nearest)


@pytest.mark.parametrize(
    ("prompt", "settings", "error", "message"),
    [
        ("a cat", {"concepts": ["noen"]}, UnknownConceptError, r"unknown concepts \['noen'\]. Did you mean 'neon'"),
        ("a cat", {"concepts": ["neon", "neon"]}, ValueError, r"concepts given twice: \['neon'\]"),
        ("a cat", {"concepts": "neon"}, TypeError, r"give a list of concepts: \['neon'\]"),
        ("a cat", {"limit": 0}, ValueError, "a whole number from 1 on, not 0"),
        (["a cat", None], {}, TypeError, r"a list of strings, not \[None\]"),
        ([], {}, ValueError, "there is no prompt to explain; give one"),
    ],
)
def test_what_cannot_be_explained_is_refused(loaded, prompt, settings, error, message):
    with pytest.raises(error, match=message):
        loaded.explain(prompt, **settings)


def test_without_a_bank_it_says_so(pipe):
    assert str(pipe.explain("a cat")) == "'a cat': no concept is loaded or asked for"
    with pytest.raises(UnknownConceptError, match=r"no bank is loaded; call load_sepme\(\) first"):
        pipe.explain("a cat", ["neon"])


def test_without_the_text_encoder_of_the_bank_it_refuses(loaded):
    encoder, loaded.text_encoder = loaded.text_encoder, random_pipeline(text_seed=1).text_encoder
    with pytest.raises(ErasureNotInForce, match="the text encoder has changed"):
        loaded.explain("a cat")
    loaded.text_encoder = None
    with pytest.raises(ErasureNotInForce, match="no text encoder, so nothing can be read of a prompt"):
        loaded.explain("a cat")
    loaded.text_encoder = encoder
    assert loaded.explain("neon dog").prompts[0]["neon"].acts
