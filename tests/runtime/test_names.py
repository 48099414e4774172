import pytest

from sepme_diffusers.runtime.erased_sets import Names, UnknownConceptError


@pytest.fixture
def names():
    return Names({"mine": ["neon", "AC/DC"], "styles": ["neon", "pencil"]})


def test_a_shared_name_is_an_error_that_shows_how_to_say_it(names):
    with pytest.raises(ValueError, match=r"say which: \{'neon': \['mine/neon', 'styles/neon'\]\}"):
        names.keys(["pencil", "neon"])
    assert names.keys(["styles/neon", "pencil"]) == [("styles", "neon"), ("styles", "pencil")]


@pytest.mark.parametrize("twin", ["neon\ufe0f", "NEON", "n\u0435on"], ids=["invisible", "case", "Cyrillic"])
def test_names_that_look_alike_in_two_banks_must_be_qualified(twin):
    names = Names({"styles": ["neon", "pencil"], "mine": [twin]})
    assert names.shown == {
        ("styles", "neon"): "styles/neon",
        ("styles", "pencil"): "pencil",
        ("mine", twin): f"mine/{twin}",
    }
    for name in ("neon", twin):
        with pytest.raises(UnknownConceptError, match="names like them; say which"):
            names.strengths([name])


def test_shown_names_are_accepted_back(names):
    assert names.keys(names.shown.values()) == list(names.shown)
    assert list(names.shown.values()) == ["mine/neon", "AC/DC", "styles/neon", "pencil"]


def test_strengths_of_names_and_mappings(names):
    assert names.strengths(["pencil"]) == {("styles", "pencil"): 1.0}
    assert names.strengths({"pencil": 2, "mine/AC/DC": 0.5}) == {("styles", "pencil"): 2.0, ("mine", "AC/DC"): 0.5}
    assert names.strengths([]) == {}


@pytest.mark.parametrize(
    ("concepts", "error", "message"),
    [
        ("pencil", TypeError, r"\['pencil'\]"),
        ([3, "pencil"], TypeError, r"strings, not \[3\]"),
        ([["pencil"]], TypeError, "strings"),
        ([""], ValueError, r"unknown concepts \[''\]"),
        (["pencl", "noen"], ValueError, "Did you mean 'pencil' for 'pencl'"),
        (["pencil", "styles/pencil"], ValueError, r"given twice: \['pencil'\]"),
        ({"pencil": 0}, ValueError, "finite number above zero"),
        ({"pencil": -1}, ValueError, "finite number above zero"),
        ({"pencil": float("inf")}, ValueError, "finite number above zero"),
        ({"pencil": float("nan")}, ValueError, "finite number above zero"),
        ({"pencil": True}, ValueError, "finite number above zero"),
        ({"pencil": "1"}, ValueError, "finite number above zero"),
        ({"pencil": None}, ValueError, "finite number above zero"),
    ],
)
def test_bad_requests_are_refused(names, concepts, error, message):
    with pytest.raises(error, match=message):
        names.strengths(concepts)
