import itertools
import json
import random

import pytest
import torch

from sepme_diffusers import BaseModel, Concept, ConceptBank, Entry, Increment, SepMEConfig
from sepme_diffusers.bank.disk.layout import MANIFEST
from sepme_diffusers.bank.disk.records import Tables, base_from_dict, base_to_dict, stated_metrics, worded, wording
from sepme_diffusers.bank.fingerprint import Encoding
from sepme_diffusers.bank.guard_sets import GuardSet
from tiny import crowd

NAMES = ["cat", "a", "{", "}", "{}", "concept", "{concept}", "{concept", "concept}", "{concept}{concept}", "\\", "{0}",
         "on", "Van Gogh", "%s", "🦊", "{{concept}}"]  # fmt: skip
PIECES = [*NAMES, " ", "a picture of ", "{con", "cept}", "{concept} ", "c", "{{", "}}", ", "]


@pytest.mark.parametrize("name", NAMES)
def test_any_prompt_comes_back_exactly(name):
    """Names in prompts or not, inside of words, braces, and what stands for a name by itself."""
    rng = random.Random(name)
    for _ in range(300):
        texts = {"".join(rng.choices([*PIECES, name], k=rng.randrange(1, 6))) for _ in range(6)}
        pairs = tuple(itertools.batched(sorted(texts), 2)) if hasattr(itertools, "batched") else tuple(
            zip(sorted(texts)[::2], sorted(texts)[1::2], strict=False)
        )  # fmt: skip
        anchors = tuple((pair[1], rng.choice(sorted(texts))) for pair in pairs)
        concept = Concept(name, pairs, anchors)
        assert worded(name, json.loads(json.dumps(wording(concept)))) == concept


def test_concepts_that_are_worded_alike_share_their_wording():
    for name in ("cat", "Van Gogh", "{"):
        concept = Concept.from_template(name, ["a {concept}", "{concept}!"], ["", "x"], anchor="dog")
        assert wording(concept) == {
            "pairs": [["a {concept}", ""], ["{concept}!", "x"]], "anchors": [["a dog"], ["dog!"]],
        }  # fmt: skip


def test_what_stands_for_a_name_by_itself_is_not_taken_for_one():
    concept = Concept("cat", (("a cat, {concept}", "a {concept}"),))
    assert wording(concept)["literal"]
    assert worded("cat", wording(concept)) == concept


def entry(name: str, guards: GuardSet, metrics: dict | None = None) -> Entry:
    increment = Increment(torch.ones(1, 8), B=torch.ones(8, 1))
    return Entry(Concept(name), increment, SepMEConfig(), guards, metrics or {"leakage": 0.0})


def test_tables_hold_what_is_shared_once_and_chains_in_order():
    tables, first = Tables(), GuardSet(("", "a"))
    second = GuardSet(("b",), extends=first)
    records = {name: tables.add(entry(name, second)) for name in ("a", "b")}
    assert list(tables.guard_sets) == [first.id, second.id]
    assert len(tables.wordings) == len(tables.configs) == 1
    other = Tables()
    assert other.adopt(records["a"], tables) == records["a"]
    assert other == tables


def size_of_manifest(bank: ConceptBank, folder) -> int:
    bank.save_pretrained(folder)
    return (folder / MANIFEST).stat().st_size


def test_the_manifest_of_mutually_guarding_concepts_grows_with_their_number(tmp_path):
    """Not with its square, which a list of all names in every record would take."""
    sizes = [size_of_manifest(crowd(f"concept {i}" for i in range(n)), tmp_path / str(n)) for n in (200, 400)]
    assert sizes[1] < 2.05 * sizes[0]
    assert sizes[1] < 400 * 600


def test_so_does_that_of_concepts_that_were_added_one_by_one(tmp_path):
    """Each guards the names that were there; the sets of the earlier ones do not change."""
    sizes = []
    for n in (200, 400):
        bank, sets = crowd(["concept 0"]), [GuardSet(("",))]
        made = []
        for i in range(n):
            sets.append(GuardSet.of(("",), [f"concept {k}" for k in range(i)], sets[-3:]))
            made.append(entry(f"concept {i}", sets[-1]))
        sizes.append(size_of_manifest(bank.with_entries(made), tmp_path / str(n)))
    assert sizes[1] < 2.2 * sizes[0]
    assert sizes[1] < 400 * 700


def test_single_leaks_are_stated_as_they_are_in_a_bank_of_a_few():
    guards = GuardSet(("", "exact"), ("damped",))
    metrics = {"leakage": 0.5, "leakage_of": {"damped": 0.5, "exact": 0.1}, "note": [1]}
    assert stated_metrics({"a": entry("a", guards, metrics)}) == {"a": metrics}


def test_of_very_many_the_ten_worst_of_a_set_are_stated_and_the_rest_is_bounded():
    rng = random.Random(0)
    guards = [GuardSet((str(k),), ("x", "y", "z")) for k in range(2)]
    bank = {}
    for i in range(1200):
        leaks = {guard: rng.random() for guard in "xyz"} | {str(i % 2): 0.001}
        metrics = {"leakage": max(leaks.values()), "leakage_of": leaks, "leakage_rest": 0.01, "reach": 1.0}
        bank[str(i)] = entry(str(i), guards[i % 2], metrics)
    stated = stated_metrics(bank)
    for k in range(2):
        of_set = {name: e.metrics["leakage_of"] for name, e in bank.items() if e.guard_set is guards[k]}
        cases = {(name, guard): leaks[guard] for name, leaks in of_set.items() for guard in "xyz"}
        worst = sorted(cases, key=cases.__getitem__)[-10:]
        for name in of_set:
            listed = stated[name]["leakage_of"]
            # What should be exact and is not would count as exact, were it not listed.
            assert listed.keys() == {str(k)} | {guard for case, guard in worst if case == name}
            rest = [leak for (case, guard), leak in cases.items() if case == name and guard not in listed]
            assert stated[name]["leakage_rest"] == max([0.01, *rest])
            assert stated[name]["reach"] == 1.0
    again = {name: entry(name, bank[name].guard_set, metrics) for name, metrics in stated.items()}
    assert stated_metrics(again) == stated


@pytest.mark.parametrize(
    "base",
    [
        BaseModel("a", {"tokens": Encoding(8, 4)}),
        BaseModel(
            "é",
            {"tokens": Encoding(8, 4, "penultimate", "a {}", 4, "zeros", ((1.0, 0.5),)), "pooled": Encoding(6)},
            {"tokenizer": "0" * 64},
            {"x": (3, 1.5)},
        ),
    ],
)
def test_a_base_survives_plain_values(base):
    back = base_from_dict(json.loads(json.dumps(base_to_dict(base))))
    assert back == base
    assert next(iter(back.doors)) == "tokens"
