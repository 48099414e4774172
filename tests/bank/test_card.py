import json
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from sepme_diffusers import ConceptBank, Picture, card_pictures, pocket
from sepme_diffusers.bank.guard_sets import GuardSet


@pytest.fixture
def card(mixed_bank, tmp_path):
    def saved(bank, **options):
        bank.save_pretrained(tmp_path / "bank", **options)
        return ModelCard.load(tmp_path / "bank" / "README.md")

    return saved


def test_the_hub_library_reads_its_metadata(card, mixed_bank):
    data = card(mixed_bank).data.to_dict()
    assert data["library_name"] == "diffusers"
    assert data["base_model"] == mixed_bank.base.name
    assert data["base_model_relation"] == "adapter"
    assert "sepme" in data["tags"]


def test_it_lists_every_concept_with_its_form_and_solver(card, mixed_bank):
    text = card(mixed_bank).text
    assert "| woodcut | module | 8 | train |" in text
    assert "| neon | text | 6 | closed_form |" in text
    assert text.count("\n| ") == len(mixed_bank) + 1


def test_it_has_the_measured_figures_and_the_exact_settings(card, mixed_bank):
    text = card(mixed_bank).text
    entry = mixed_bank["woodcut"]
    assert f"steps {entry.metrics['steps']}" in next(line for line in text.splitlines() if "| woodcut |" in line)
    shown = [json.loads(block) for block in re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)]
    assert shown == [mixed_bank["neon"].config.to_dict(), entry.config.to_dict()]
    assert "the blank prompt, watermark" in text


def test_it_does_not_call_exact_what_was_damped(card, text_bank):
    guards = GuardSet(("", "watermark"), ("a lamp", "a sofa"))
    text = card(text_bank.with_entries([replace(text_bank["neon"], guard_set=guards)]).subset(["neon"])).text
    exact, damped = re.search(
        r"exactly as they were\.(.*?)These were damped instead(.*?)\n\n", text, re.DOTALL
    ).groups()
    assert "the blank prompt, watermark." in exact
    assert "lamp" not in exact
    assert "a lamp, a sofa." in damped
    assert "damped" not in card(text_bank).text


def test_the_card_of_thousands_stays_small(card, text_bank):
    """200 rows, 50 names in each list, 20 settings, whatever the bank holds."""
    entry = text_bank["neon"]
    names = [f"concept {number}" for number in range(3000)]
    guards = GuardSet(("", "x" * 50_000, *(f"guard {number}" for number in range(3000))), names)
    configs = [replace(entry.config, seed=seed) for seed in range(30)]
    made = [
        replace(entry, concept=replace(entry.concept, name=name), guard_set=guards, config=configs[number % 30])
        for number, name in enumerate(names)
    ]
    text = card(replace(text_bank, entries={e.concept.name: e for e in made}, always=tuple(names))).text
    assert text.count("\n| ") == 200 + 1
    assert "And 2800 more." in text
    assert "guard 47, guard 48" not in text
    assert "guard 46, guard 47 and 2952 more" in text
    assert "concept 48, concept 49 and 2950 more." in text
    assert "concept 49 and 2950 more, which its policy always erases" in text
    assert text.count("```json") == 20
    assert "And 10 more, in `sepme_bank.json`." in text
    assert len(text) < 100_000


def test_it_says_what_a_policy_always_erases(card, text_bank):
    assert "except" not in card(text_bank).text
    assert "except cat, neon, which its policy always erases" in card(replace(text_bank, always=("cat", "neon"))).text


def test_names_cannot_break_out_of_its_snippet(card, text_bank):
    """A base model's name is quoted as a Python string."""
    bank = replace(text_bank, base=replace(text_bank.base, name='a"); import os #'))
    assert 'from_pretrained("a\\"); import os #")' in card(bank).text


def test_names_cannot_break_out_of_its_table(card, text_bank):
    name = "a|b <img src=x> `c`"
    bank = text_bank.with_entries([replace(text_bank["neon"], concept=replace(text_bank["neon"].concept, name=name))])
    assert r"| a\|b \<img src=x\> \`c\` | text |" in card(bank).text


def test_a_snippet_names_concepts_of_any_script(card, text_bank):
    name = '\U0001f58d Ölkreide "x"'
    entry = replace(text_bank["neon"], concept=replace(text_bank["neon"].concept, name=name))
    snippet = re.search(r"set_erased\((.*)\)", card(replace(text_bank, entries={name: entry})).text)[1]
    assert eval(snippet) == [name]


def test_licence_and_pictures_stay_when_the_bank_is_saved_again(card, text_bank):
    pictures = [Picture("cat-before", "a cat (before)", Image.new("RGB", (8, 8), "red"))]
    first = card(text_bank, license="cc-by-4.0", pictures=pictures)
    assert "<Gallery />" in first.text
    again = card(text_bank)
    assert again.data.license == "cc-by-4.0"
    assert again.data.widget == [{"text": "a cat (before)", "output": {"url": "assets/cat-before.png"}}]


def test_pictures_lie_in_the_banks_folder_and_are_not_part_of_the_bank(text_bank, tmp_path):
    picture = Picture("cat-before", "a cat", Image.new("RGB", (8, 8), "red"))
    text_bank.save_pretrained(tmp_path, pictures=[picture])
    assert Image.open(tmp_path / "assets" / "cat-before.png").size == (8, 8)
    (tmp_path / "assets" / "cat-before.png").write_bytes(b"")
    ConceptBank.from_pretrained(tmp_path).save_pretrained(tmp_path)


def test_a_concept_called_assets_is_kept_apart_from_pictures(text_bank, tmp_path):
    concept = replace(text_bank["neon"].concept, name="Assets")
    bank = text_bank.with_entries([replace(text_bank["neon"], concept=concept)])
    bank.save_pretrained(tmp_path, pictures=[Picture("neon", "neon", Image.new("RGB", (8, 8)))])
    assert [file.name for file in (tmp_path / "assets").iterdir()] == ["neon.png"]
    assert set(ConceptBank.from_pretrained(tmp_path)) == set(bank)


@pytest.mark.parametrize("name", ["../x", "a b", "A", "", "a/b"])
def test_a_picture_cannot_be_put_elsewhere(name):
    with pytest.raises(ValueError, match="name"):
        Picture(name, "", Image.new("RGB", (8, 8)))


def test_somebodys_own_card_is_no_obstacle(card, text_bank, tmp_path):
    text_bank.save_pretrained(tmp_path / "bank")
    for text in ("no metadata", "---\n- a\n---\n", "---\n: [\n---\n", "---\nwidget: 3\n---\n"):
        (tmp_path / "bank" / "README.md").write_text(text)
        assert card(text_bank).data.to_dict()["library_name"] == "diffusers"


def test_pictures_show_a_concept_before_erased_and_restored(pocket_pipe):
    """By the built-in model and bank; a policy does not keep its concept from being shown."""
    bank = replace(pocket.bank("styles"), always=("woodcut",))
    prompts = {"woodcut": "a fox in the style of woodcut", "neon": "a neon cat"}
    pictures = card_pictures(pocket_pipe, bank, prompts, num_inference_steps=10, guidance_scale=4)
    assert [picture.name for picture in pictures[:3]] == ["woodcut-before", "woodcut-erased", "woodcut-restored"]
    before, erased, restored = (picture.image for picture in pictures[:3])
    styles, _ = pocket.classify([before, erased])
    woodcut = pocket.style_classes.index("woodcut")
    assert styles[0, woodcut] > 0.5 > styles[1, woodcut]
    assert before.tobytes() == restored.tobytes()
    assert pocket_pipe.erasable == ()
