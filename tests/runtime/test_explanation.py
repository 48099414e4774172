"""What an explanation says in words, as a table and as plain values."""

import json

import pytest

from sepme_diffusers.runtime.explanation import Explanation, PromptReading
from sepme_diffusers.runtime.readings import ConceptReading, DoorReading


def concept(name, reading, gate, open, spelled=(), strength=1.0, **settings):
    return ConceptReading(name, (DoorReading("tokens", reading, gate, open, "cat"),), spelled, strength, **settings)


NEON = concept("neon", 0.3, 1.0, True, ("neon",))
WOODCUT = concept("woodcut", 0.12, 0.84, False)


@pytest.mark.parametrize(
    ("reading", "verdict"),
    [
        (NEON, "neon acts (it is spelled)"),
        (WOODCUT, "woodcut does not (reads 0.12, its gate is 0.84)"),
        (concept("neon", 0.3, 1.0, True, ("glowing",)), "neon acts (it is spelled 'glowing')"),
        (concept("neon", 1.2, 1.0, True, ("neon",)), "neon acts (reads 1.2, its gate is 1)"),
        (concept("neon", 0.3, None, True), "neon acts (reads 0.3, it has no gate)"),
        (concept("neon", 0.0, None, True), "neon does not (reads nothing)"),
        (concept("neon", 0.0, 1.0, True, ("neon",)), "neon does not (reads nothing)"),
        (concept("neon", 0.3, 1.0, True, ("neon",), 0.0), "neon would act if erased (it is spelled)"),
        (concept("neon", 0.3, 1.0, False, (), 0.0), "neon would not (reads 0.3, its gate is 1)"),
    ],
)
def test_a_verdict_says_what_a_concept_does_and_why(reading, verdict):
    assert reading.verdict == verdict


def test_a_concept_acts_if_it_acts_at_one_door_and_the_reason_is_that_doors():
    doors = (DoorReading("tokens", 0.9, 1.0, False), DoorReading("pooled", 0.6, 0.5, True))
    reading = ConceptReading("neon", doors, strength=1.0)
    assert reading.acts
    assert reading.nearness == 1.2
    assert reading.verdict == "neon acts (reads 0.6 at the door 'pooled', its gate is 0.5)"


def test_a_sentence_names_what_is_erased_first_and_counts_the_rest():
    free = [concept(f"c{number}", 2.0, 1.0, True, (), 0.0) for number in range(4)]
    said = PromptReading("a cat", (*free, NEON, WOODCUT), more_act=1, more_do_not=93).sentence
    assert said == (
        "'a cat': neon acts (it is spelled); woodcut does not (reads 0.12, its gate is 0.84); "
        "c0 would act if erased (reads 2, its gate is 1); c1 would act if erased (reads 2, its gate is 1); "
        "3 of 96 more would act if erased"
    )


def test_a_reading_is_found_by_its_name():
    reading = PromptReading("a cat", (NEON, WOODCUT))
    assert reading["woodcut"] is WOODCUT
    with pytest.raises(KeyError, match=r"'fox' is not listed here; ask for it with concepts=\['fox'\]"):
        reading["fox"]


def test_printed_it_is_a_table_in_plain_text():
    always = concept("fox", 0.5, None, True, strength=0.5, always=True)
    shown = str(Explanation((PromptReading("a cat", (NEON, always), 0, 7), PromptReading("", ()))))
    assert shown.splitlines()[1:] == [
        "concept  erased        acts  spelled  door    reads  gate  word",
        "neon     yes           yes   neon     tokens  0.3    1     cat",
        "fox      always x 0.5  yes            tokens  0.5    none  cat",
        "0 more act where they are erased, 7 do not",
        "",
        "'': no concept is loaded or asked for",
    ]


def test_in_a_notebook_names_and_prompts_are_no_markup():
    html = Explanation((PromptReading("<b>", (concept("<i>", 0.5, None, True),)),))._repr_html_()
    assert "<th>gate</th>" in html
    assert "&lt;i&gt;</td>" in html
    assert "<b>" not in html
    assert "<i>" not in html


def test_plain_values_hold_everything():
    values = Explanation((PromptReading("a cat", (NEON,), 1, 2),)).to_dict()
    assert json.loads(json.dumps(values)) == {
        "prompts": [
            {
                "prompt": "a cat",
                "concepts": [
                    {
                        "concept": "neon",
                        "doors": [{"door": "tokens", "reading": 0.3, "gate": 1.0, "open": True, "word": "cat"}],
                        "spelled": ["neon"],
                        "strength": 1.0,
                        "always": False,
                        "erased": True,
                        "acts": True,
                    }
                ],
                "more_act": 1,
                "more_do_not": 2,
                "sentence": "'a cat': neon acts (it is spelled); 1 of 3 more would act if erased",
            }
        ]
    }
