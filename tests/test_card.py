from dataclasses import replace

import pytest
from huggingface_hub import ModelCard


@pytest.fixture
def card(mixed_bank, tmp_path):
    def saved(bank):
        bank.save_pretrained(tmp_path / "bank")
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
    assert "| woodcut | module | 8 | train | 5 |" in text
    assert "| neon | text | 6 | closed_form | 4 |" in text
    assert text.count("\n| ") == len(mixed_bank) + 1


def test_it_says_what_a_policy_always_erases(card, text_bank):
    assert "except" not in card(text_bank).text
    assert "except cat, neon, which its policy always erases" in card(replace(text_bank, always=("cat", "neon"))).text


def test_names_cannot_break_out_of_its_snippet(card, text_bank):
    """A base model's name is quoted as a Python string."""
    bank = replace(text_bank, base=replace(text_bank.base, name='a"); import os #'))
    assert 'from_pretrained("a\\"); import os #")' in card(bank).text
