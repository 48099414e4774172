import random

import pytest
import torch

from sepme_diffusers import BaseModel, Concept, ConceptBank, Entry, Guarantee, Increment, SepMEConfig
from sepme_diffusers.bank.entries import Entries
from sepme_diffusers.bank.fingerprint import Encoding
from sepme_diffusers.bank.guard_sets import GuardSet
from tiny import crowd

BASE = BaseModel("tiny", {"tokens": Encoding(8, 4)})
INCREMENT = Increment(torch.ones(1, 8), B=torch.ones(8, 1))


def brute(bank: ConceptBank) -> dict[str, Guarantee]:
    """Every prompt against every entry."""
    promises = {}
    for prompt in {prompt for entry in bank.values() for prompt in entry.guard_set} | set(bank):
        unaware, leakage, shares = [], 0.0, []
        for name, entry in bank.items():
            if name == prompt:
                continue
            leaks = entry.metrics.get("leakage_of", {})
            if prompt not in entry.guards:
                unaware.append(name)
            elif prompt in leaks:
                leakage = max(leakage, leaks[prompt])
            elif prompt in entry.guards.damped:
                leakage = max(leakage, entry.metrics.get("leakage_rest", 0.0))
            if prompt in entry.guards.damped:
                shares.append(entry.metrics.get("gate_share", 0.0))
        if unaware or leakage:
            promises[prompt] = Guarantee(None, leakage, tuple(unaware))
        elif shares:
            promises[prompt] = Guarantee("gate", 0.0, (), pytest.approx(1 - max(shares), abs=1e-3))
        else:
            promises[prompt] = Guarantee("null space", 0.0, ())
    return promises


def random_bank(rng: random.Random) -> ConceptBank:
    names, sets = [f"c{i}" for i in range(rng.randrange(1, 8))], []
    for _ in range(rng.randrange(1, 5)):
        parent = rng.choice([None, *sets])
        free = [p for p in [*names, "", "watermark", "fox"] if parent is None or p not in parent]
        chosen = rng.sample(free, rng.randrange(len(free) + 1))
        cut = rng.randrange(len(chosen) + 1)
        sets.append(GuardSet(tuple(chosen[:cut]), tuple(chosen[cut:]), parent))
    entries = {}
    for name in names:
        guards = rng.choice(sets)
        own = [prompt for prompt in guards if prompt != name]
        leaks = {prompt: rng.choice([0.1, 0.2, 0.3]) for prompt in rng.sample(own, rng.randrange(len(own) // 2 + 1))}
        metrics = {"leakage": 1.0, "leakage_of": leaks if rng.random() < 0.5 else {}}
        metrics |= rng.choice([{}, {}, {"leakage_rest": rng.choice([0.05, 0.15])}])
        metrics |= rng.choice([{}, {"gate_share": rng.choice([0.2, 0.5, 0.8])}])
        entries[name] = Entry(Concept(name), INCREMENT, SepMEConfig(), guards, metrics)
    return ConceptBank(BASE, Entries(entries))


@pytest.mark.parametrize("seed", range(60))
def test_what_is_looked_up_is_what_every_entry_says_of_every_prompt(seed):
    bank = random_bank(random.Random(seed))
    expected = brute(bank)
    assert dict(bank.guarantees) == expected
    assert len(bank.guarantees) == len(expected)


def test_what_nobody_guards_has_no_promise():
    with pytest.raises(KeyError, match=r"'fox'.*is no concept's name"):
        crowd(["a", "b"]).guarantees["fox"]


def test_a_lookup_asks_each_set_once_and_no_entry(monkeypatch):
    """However many concepts guard each other's names."""
    asked, has_own = [], GuardSet.has_own
    bank = crowd(map(str, range(300)))
    monkeypatch.setattr(GuardSet, "has_own", lambda self, prompt: (asked.append(prompt), has_own(self, prompt))[1])
    assert len(dict(bank.guarantees)) == len(asked) == 301
