"""Room for guards: exact while it lasts, damped above, never silently dropped."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import Concept, ConceptBank, SepMETrainer, pocket
from sepme_diffusers.algebra.closed_form import covariance
from sepme_diffusers.algebra.subspace import row_space
from sepme_diffusers.bank.checks.verify import verify
from sepme_diffusers.increment.leakage import leakage
from sepme_diffusers.making.decouple import decouple
from sepme_diffusers.making.embedded import EmbeddedConcept
from sepme_diffusers.making.guards import Guards
from sepme_diffusers.text.encoding import Encoded, encode, rows
from small import CLOSED, CONCEPTS, TRAIN, latents, random_pipeline

MANY = pocket.objects[:60]
CAT, DOG = Concept("cat", (("a cat", ""),)), Concept("dog", (("a dog", ""),))


@pytest.fixture(scope="module")
def crowded() -> ConceptBank:
    """Cat and dog, and fifty-eight more names: more than fit into the null space."""
    others = [name for name in MANY if name not in ("cat", "dog")]
    return SepMETrainer(random_pipeline(), CLOSED, ["watermark"], others=others).erase([CAT, DOG])


def test_capacity_tells_what_is_left_and_what_one_more_takes(pipe):
    room = SepMETrainer(pipe, CLOSED, ["watermark"]).capacity(CONCEPTS)
    encoded = Encoded(pipe)
    without = row_space(rows(encoded(["", "watermark", "cat", "pencil"])))
    with_it = row_space(rows(encoded(["", "watermark", "cat", "pencil", "neon"])))
    assert room["neon"].dimensions == 384
    assert room["neon"].dimensions_left == 384 - len(without)
    assert room["neon"].dimensions_taken == len(with_it) - len(without) > 0
    assert room["neon"].names_exact == room["neon"].names == 3
    assert room["neon"].leakage < 1e-5
    assert 0 < room["neon"].reach <= 1


def test_capacity_is_what_erasing_then_finds(pipe, crowded):
    others = [name for name in MANY if name not in ("cat", "dog")]
    room = SepMETrainer(pipe, CLOSED, ["watermark"], others=others).capacity([CAT, DOG])
    for name, entry in crowded.items():
        assert (room[name].names_exact, room[name].names) == (0, 60)
        assert room[name].dimensions_left == entry.metrics["dimensions_left"]
        assert room[name].leakage == pytest.approx(entry.metrics["leakage"], rel=1e-2)


def test_above_capacity_names_leak_little_and_the_bank_says_how_much(pipe, crowded):
    """Own guards stay exact; every name is still guarded, and its leakage written down."""
    entry = crowded["cat"]
    assert set(entry.guards) == {"", "watermark", *MANY} - {"cat"}
    assert not {"", "watermark"} & entry.metrics["leakage_of"].keys()
    assert len(entry.metrics["leakage_of"]) == 10
    assert min(entry.metrics["leakage_of"].values()) >= entry.metrics["leakage_rest"] > 1e-5
    before = latents(pipe, "watermark")
    pipe.load_sepme(crowded)
    assert torch.equal(latents(pipe, "watermark", erased=["cat", "dog"]), before)
    promise = crowded.guarantees["fox"]
    assert not promise.exact
    listed = [e.metrics["leakage_of"].get("fox", e.metrics["leakage_rest"]) for e in crowded.values()]
    assert promise.leakage == max(*listed, *(e.metrics["leakage_rest"] for e in crowded.values()))
    assert crowded.guarantees["watermark"].exact
    assert verify(crowded, random_pipeline()).ok


def test_nothing_damped_is_promised_to_be_exact_however_little_it_leaks(pipe):
    """With room to spare a heavy weight leaves less than what is otherwise called exact; bits still move."""
    config = replace(CLOSED, reserve=0.99, name_weight=1e5)
    bank = SepMETrainer(pipe, config).erase([CAT, DOG])
    assert "leakage_of" not in bank["cat"].metrics
    assert 0 < bank["cat"].metrics["leakage_rest"] < 1e-5
    assert not bank.guarantees["dog"].exact


def test_a_heavier_weight_leaks_less_and_none_leaks_more(pipe, crowded):
    others = [name for name in MANY if name != "cat"]
    leaks = []
    for weight in (0.0, CLOSED.name_weight, 100 * CLOSED.name_weight):
        trainer = SepMETrainer(pipe, replace(CLOSED, name_weight=weight), ["watermark"], others=others)
        leaks.append(sum(trainer.erase([CAT])["cat"].metrics["leakage_of"].values()))
    assert leaks[0] > 2 * leaks[1] > 4 * leaks[2] > 0


@pytest.mark.parametrize("basis", ["full", "aligned"])
def test_training_damps_as_well(pipe, basis):
    others = [name for name in MANY if name != "cat"]
    leaks = []
    for weight in (0.0, 1e4):
        config = replace(TRAIN, basis=basis, name_weight=weight)
        entry = SepMETrainer(pipe, config, ["watermark"], others=others).erase([CAT])["cat"]
        leaks.append(sum(entry.metrics["leakage_of"].values()))
        assert not {"", "watermark"} & entry.metrics["leakage_of"].keys()
    assert leaks[1] < 0.5 * leaks[0]


def test_the_reserve_decides(pipe):
    encoded, names = Encoded(pipe), [concept.name for concept in CONCEPTS]
    taken = len(row_space(rows(encoded(["", *names]))))
    exact = replace(CLOSED, reserve=1 - (taken + 0.5) / 384)
    assert Guards.of(encoded, [""], names, exact).n_exact == len(names)
    little_less = replace(CLOSED, reserve=1 - (taken - 0.5) / 384)
    # Each increment guards all but its own concept's name, and so they still fit.
    assert Guards.of(encoded, [""], names, little_less).n_exact == len(names)
    without = [len(row_space(rows(encoded(["", *(n for n in names if n != left_out)])))) for left_out in names]
    tight = replace(CLOSED, reserve=1 - (max(without) - 0.5) / 384)
    room = max(without) - 1
    fitting = [len(row_space(rows(encoded(["", *names[:count]])))) <= room for count in (1, 2, 3)]
    assert Guards.of(encoded, [""], names, replace(tight, gate=0.5)).n_exact == sum(fitting) < len(names)
    assert Guards.of(encoded, [""], names, tight).n_exact == 0


def test_with_a_gate_the_first_names_are_exact_and_the_adapter_damps_all(pipe):
    """A gate keeps the others as they were; what stands for it without a gate needs the directions."""
    others = [name for name in MANY if name not in ("cat", "dog")]
    trainer = SepMETrainer(pipe, replace(CLOSED, gate=0.9, soft_guard_weight=1.0), ["watermark"], ["a house"], others)
    bank = trainer.erase([CAT, DOG])
    exact = [name for name in MANY if bank.guarantees[name].by == "null space"]
    room = trainer.capacity([CAT])["cat"]
    assert exact == others[: room.names_exact]
    assert 10 < room.names_exact < 30
    tokens = encode(pipe, exact)
    assert float(leakage(bank["cat"].increment, tokens).max()) == 0
    assert float(leakage(bank["cat"].adapter, tokens).max()) > 1e-3
    assert bank["cat"].metrics["adapter_leakage"] > 1e-3


def test_damping_is_announced(pipe, caplog):
    Guards.of(Encoded(pipe), [""], MANY, CLOSED)
    assert "names are guarded exactly, and the others are damped" in caplog.text


def test_a_prompt_that_is_a_guard_is_refused_by_name(pipe, text_bank):
    """Two spellings that the tokenizer reads alike leave no dimension; nothing is added."""
    with pytest.raises(ValueError, match=r"'a  CAT' of concept 'feline' .* guard 'a cat': no dimension"):
        SepMETrainer(pipe, CLOSED, guards=["a cat"]).erase([Concept("feline", (("a  CAT", ""),))], text_bank)
    assert list(text_bank) == ["neon", "cat", "pencil"]


def test_hard_guards_that_fill_everything_are_refused(pipe):
    words = list(pipe.tokenizer.get_vocab())[100:600]
    guards = [word.removesuffix("</w>") for word in words if word.endswith("</w>") and word != "neon</w>"]
    with pytest.raises(ValueError, match=r"fill the space that 'neon' lives in|fills all 384"):
        SepMETrainer(pipe, CLOSED, guards=guards).erase([Concept.paper("neon")])


def test_a_crowded_bank_can_be_decoupled(pipe):
    """Above capacity older increments are damped on newcomers, and it says what leaks and what is left."""
    others = [name for name in MANY if name not in ("cat", "dog")]
    bank = SepMETrainer(pipe, CLOSED, ["watermark"], others=others).erase([CAT])
    grown = SepMETrainer(pipe, CLOSED, ["watermark"], others=others).erase([DOG], bank)
    assert grown.guarantees["dog"].unaware == ("cat",)
    decoupled = decouple(grown, pipe)
    assert decoupled.guarantees["dog"].unaware == ()
    assert decoupled["cat"].metrics["leakage_rest"] > 0
    assert 0.5 < decoupled["cat"].metrics["effect_kept"] <= 1.1
    assert not {"", "watermark"} & decoupled["cat"].metrics["leakage_of"].keys()


def test_the_penalty_is_that_of_the_other_names_and_of_regular_prompts(pipe):
    """It is computed from parts that all concepts share; written out it is the sum over names, in N's coordinates."""
    encoded = Encoded(pipe)
    guards, soft = Guards.of(encoded, ["", "watermark"], MANY, CLOSED), covariance(rows(encoded(["a house"])))
    for concept in (CAT, Concept("no guarded name", (("a cow", ""),))):
        null = guards.null(concept)
        others = [rows(encoded([name])).double() @ null.T for name in MANY if name != concept.name]
        of_names = CLOSED.name_weight * sum(tokens.T @ tokens / len(tokens) for tokens in others)
        embedded = EmbeddedConcept.of(concept, encoded)
        torch.testing.assert_close(guards.penalty(embedded, null), of_names, rtol=1e-9, atol=1e-9)
        of_both = of_names + 3 * null @ soft @ null.T
        torch.testing.assert_close(guards.penalty(embedded, null, soft, 3.0), of_both, rtol=1e-9, atol=1e-9)
    roomy = Guards.of(encoded, [""], ["cat"], CLOSED)
    assert roomy.penalty(EmbeddedConcept.of(CAT, encoded), roomy.null(CAT)) is None


@pytest.mark.parametrize("names", [["cat", "dog", "fox", "bus", "neon"], MANY], ids=["exact", "damped"])
def test_names_may_come_in_any_batches(pipe, names):
    """What is kept of them does not depend on the batches, and damped names leave nothing of their rows behind."""
    encoded = Encoded(pipe)
    together = Guards.of(encoded, ["", "watermark"], names, CLOSED)
    apart = Guards(["", "watermark"], encoded(["", "watermark"]), CLOSED)
    for start in range(0, len(names), 7):
        apart.update(names[start : start + 7], encoded(names[start : start + 7]))
    assert apart.n_exact == together.n_exact
    assert (apart.n_exact == len(names)) == (names is not MANY)
    assert apart.guard_set(apart.n_exact) == together.guard_set(together.n_exact)
    null, cat = together.null(CAT), EmbeddedConcept.of(CAT, encoded)
    torch.testing.assert_close(apart.null(CAT), null)
    if names is not MANY:
        return
    torch.testing.assert_close(apart.penalty(cat, null), together.penalty(cat, null), rtol=1e-9, atol=1e-9)
    assert tuple(apart._kept) == tuple(MANY[: apart.n_exact])
    assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in apart._kept.values())


def test_a_prompt_that_is_any_guard_is_found_among_very_many(pipe):
    """Also a damped one, of which no embedding is kept."""
    encoded = Encoded(pipe)
    guards = Guards.of(encoded, [""], MANY, CLOSED)
    same = EmbeddedConcept.of(Concept("feline", (("a house", ""), (" FOX", ""))), encoded)
    with pytest.raises(ValueError, match=r"prompt ' FOX' of concept 'feline' .* guard 'fox'"):
        guards.refuse_alike(same)
    guards.refuse_alike(EmbeddedConcept.of(Concept("fox", (("fox", ""),)), encoded))
    guards.refuse_alike(EmbeddedConcept.of(CAT, encoded))
