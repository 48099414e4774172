import pytest

from sepme_diffusers import UnknownConceptError
from sepme_diffusers.runtime.call_sets import Request, default_set, sets_of_call
from sepme_diffusers.runtime.snapshot import LoadOptions, Snapshot

NEON, CAT, PENCIL = (("bank", name) for name in ("neon", "cat", "pencil"))


@pytest.fixture
def snapshot(text_bank):
    return Snapshot.of({"bank": text_bank}, {"bank": LoadOptions()}, {NEON: 1.0})


def sets(erased, snapshot, request=None, prompts=2, each=1):
    return sets_of_call(erased, snapshot, request or Request(), prompts, each)[0]


def test_a_call_without_a_set_has_the_standing_set_or_the_requests_default(snapshot):
    assert sets(None, snapshot) == [{NEON: 1.0}]
    assert sets(None, snapshot, Request(default={CAT: 1.0})) == [{CAT: 1.0}]
    assert default_set(snapshot, Request(default={})) == {}


def test_a_calls_set_replaces_the_default_and_floors_are_added(snapshot):
    request = Request(always={PENCIL: 1.0}, default={CAT: 1.0})
    assert sets([], snapshot, request) == [{PENCIL: 1.0}]
    assert sets({"pencil": 0.5, "neon": 2.0}, snapshot, request) == [{NEON: 2.0, PENCIL: 1.0}]
    assert sets({"pencil": 2.0}, snapshot, request) == [{PENCIL: 2.0}]


def test_one_set_per_prompt_with_none_for_the_default(snapshot):
    assert sets([["cat"], None], snapshot) == [{CAT: 1.0}, {NEON: 1.0}]
    assert sets([["cat"], []], snapshot, each=2) == [{CAT: 1.0}, {CAT: 1.0}, {}, {}]
    assert sets([["neon"], None], snapshot) == [{NEON: 1.0}]  # equal sets are one for the whole batch


@pytest.mark.parametrize(
    ("erased", "default", "explicit"),
    [
        (None, None, False), (None, {}, True), ([], None, True), (["neon"], None, True), ([["neon"], []], None, True),
        ([["neon"], None], None, False), ([["neon"], None], {CAT: 1.0}, True),
    ],
)  # fmt: skip
def test_a_call_is_explicit_if_nothing_falls_to_the_standing_set(erased, default, explicit, snapshot):
    assert sets_of_call(erased, snapshot, Request(default=default), 2)[1] is explicit


def test_the_order_in_which_names_are_given_leaves_no_trace(snapshot):
    assert list(sets(["pencil", "neon", "cat"], snapshot)[0]) == list(sets(["cat", "pencil", "neon"], snapshot)[0])


@pytest.mark.parametrize(
    ("erased", "error", "message"),
    [
        ("neon", TypeError, "neon"),
        ([["neon"]], ValueError, "1 erased sets for 2 prompts"),
        ([["neon"], ["neon", "neon"]], ValueError, "given twice"),
        (["noen"], UnknownConceptError, "Did you mean 'neon'"),
        (["neon", None], ValueError, "neon"),
    ],
)
def test_what_is_no_set_is_refused(erased, error, message, snapshot):
    with pytest.raises((error, TypeError), match=message):
        sets(erased, snapshot)


def test_a_generator_is_read_once_and_erases_all_that_it_names(snapshot):
    assert sets((name for name in ["cat", "neon"]), snapshot) == [{NEON: 1.0, CAT: 1.0}]
