import pickle
import random

import pytest

from sepme_diffusers.bank.guard_sets import LONGEST_CHAIN, Guarded, GuardSet, content_name


def test_a_set_has_its_own_prompts_and_those_that_it_extends():
    first = GuardSet(("", "neon"), ("cat",))
    second = GuardSet(("fox",), ("dog",), extends=first)
    assert list(second) == ["", "neon", "fox", "cat", "dog"]
    assert len(second) == 5
    assert all(prompt in second for prompt in second)
    assert "pencil" not in second
    assert (list(second.all_exact), list(second.all_damped)) == (["", "neon", "fox"], ["cat", "dog"])


def test_sets_are_named_by_what_they_hold_and_how():
    one, other = GuardSet(("a", "b")), GuardSet(("a", "b"))
    assert (one, hash(one), one.id) == (other, hash(other), other.id)
    extended = GuardSet(("b",), extends=GuardSet(("a",)))
    different = [
        one,
        GuardSet(("b", "a")),
        GuardSet(("a",), ("b",)),
        extended,
        GuardSet(("a", "b"), extends=GuardSet()),
    ]
    assert len(set(different)) == len(different)


def test_plain_values_and_back():
    first = GuardSet(("", "é🦊"), ("cat",))
    second = GuardSet(("fox",), extends=first)
    assert first.id == content_name(first.to_dict())
    known = {first.id: GuardSet.from_dict(first.to_dict(), {})}
    assert GuardSet.from_dict(second.to_dict(), known) == second


@pytest.mark.parametrize(
    ("exact", "damped", "extends"),
    [(("a", "a"), (), None), (("a",), ("a",), None), (("a",), (), GuardSet(("a",))), ((), ("a",), GuardSet(("a",)))],
)
def test_no_prompt_is_there_twice(exact, damped, extends):
    with pytest.raises(ValueError, match=r"these prompts twice: \['a'\]"):
        GuardSet(exact, damped, extends)


def test_chains_end():
    chained = GuardSet(("",))
    for i in range(LONGEST_CHAIN - 1):
        chained = GuardSet((str(i),), extends=chained)
    assert len(chained) == len(chained.chain()) == LONGEST_CHAIN
    with pytest.raises(ValueError, match=f"at most {LONGEST_CHAIN} members"):
        GuardSet(("more",), extends=chained)
    assert pickle.loads(pickle.dumps(chained)) == chained
    assert str(LONGEST_CHAIN - 2) in repr(chained)


def test_an_own_name_is_no_guard():
    guards = Guarded(GuardSet(("", "neon"), ("cat", "fox")), "cat")
    assert list(guards) == ["", "neon", "fox"]
    assert len(guards) == 3
    assert "cat" not in guards
    assert (list(guards.exact), list(guards.damped)) == (["", "neon"], ["fox"])
    assert len(Guarded(guards.set, "pencil")) == 4


@pytest.mark.parametrize("seed", range(20))
def test_a_set_of_prompts_extends_a_known_one_and_holds_no_other_prompts(seed):
    rng, known = random.Random(seed), []
    for _ in range(30):
        prompts = rng.sample(range(40), rng.randrange(1, 40))
        exact, damped = (list(map(str, part)) for part in (prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]))
        made = GuardSet.of(exact, damped, known)
        assert set(made.all_exact) == set(exact)
        assert set(made.all_damped) == set(damped)
        assert GuardSet.of(exact, damped, [*known, made]) == made
        known.append(made)


def listed(n: int, step: int) -> tuple[int, int]:
    """How many prompts all sets list, and how long the longest chain is, if a bank grows to n names by steps."""
    known: list[GuardSet] = []
    for size in range(step, n + 1, step):
        known.append(GuardSet.of(("", *map(str, range(size))), (), known[-5:]))
    parts = {part for guards in known for part in guards.chain()}
    return sum(part.n_own for part in parts), max(len(guards.chain()) for guards in known)


@pytest.mark.parametrize("step", [1, 7])
def test_growing_by_a_few_names_lists_hardly_more_than_the_names(step):
    """Not their square: twice the names are little more than twice the list, and chains stay short."""
    (some, _), (twice, longest) = listed(200, step), listed(400, step)
    assert twice < 2.5 * some
    assert twice < 10 * 400
    assert longest <= 10
