"""`sepme erase`, `capacity` and `soft-guards` on the built-in model."""

import json

import pytest
from typer.testing import CliRunner

from sepme_diffusers import ConceptBank, SoftGuards, pocket
from sepme_diffusers.cli.app import app

BASE = str(pocket.path())
DESCRIBED = ["--concept", "neon", "--template", "a cat in the style of {concept}", "--without", "a cat"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_bank_is_made_and_added_to(tmp_path):
    regular = ("a cat", "a dog", "a pencil fox", *(f"a {style} bus" for style in pocket.styles[:9]))
    (tmp_path / "regular.txt").write_text("\n".join(regular))
    shown = run("soft-guards", BASE, tmp_path / "regular.txt", tmp_path / "regular.safetensors")
    assert shown.exit_code == 0, shown.output
    loaded = SoftGuards.load(tmp_path / "regular.safetensors")
    assert sorted((*loaded.prompts, *loaded.held_out)) == sorted(regular)
    options = ["--solver", "closed_form", "--guard", "watermark", "--regular"]
    shown = run("erase", BASE, tmp_path / "bank", *DESCRIBED, *options, tmp_path / "regular.safetensors")
    assert shown.exit_code == 0, shown.output
    before = {file: file.read_bytes() for file in (tmp_path / "bank").glob("increments-*")}
    concepts = [
        {"name": "dog", "template": ["a {concept}"], "without": [""], "anchor": "cat"},
        {"name": "fox", "pairs": [["a fox", ""]]},
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    (tmp_path / "settings.json").write_text(json.dumps({"solver": "closed_form", "rank": 3}))
    more = ["--concepts", tmp_path / "concepts.json", "--config", tmp_path / "settings.json"]
    shown = run("erase", BASE, tmp_path / "bank", *more, "--regular", tmp_path / "regular.txt")
    assert shown.exit_code == 0, shown.output
    bank = ConceptBank.from_pretrained(tmp_path / "bank")
    assert list(bank) == ["neon", "dog", "fox"]
    assert bank["dog"].concept.anchors == (("a cat",),)
    assert bank["fox"].increment.rank == 3
    assert set(bank["neon"].guards) == {"", "watermark"}
    assert len(before) == 1
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize(("options", "there"), [((), True), (("--no-adapters",), False)])
def test_adapters_are_written_unless_they_are_refused(options, there, tmp_path):
    shown = run("erase", BASE, tmp_path / "bank", "--style", "neon", *options)
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "bank" / "neon" / "adapter_config.json").exists() is there


def test_capacity_is_told_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("capacity", BASE, *DESCRIBED, "--concept", "pixel")
    assert shown.exit_code == 0, shown.output
    assert "Of 384 dimensions" in shown.output
    assert shown.output.count("2 of 2") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no concept given"),
        (("--style", "neon", "--solver", "magic"), "'closed_form'"),
        (("--style", "neon", "--guard", "neon"), "no dimension is left"),
        (("--concept", "neon"), "Say its kind"),
        (("--concepts", "missing.json"), "missing.json"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence_and_nothing_written(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("erase", BASE, "bank", *options)
    assert shown.exit_code == 2
    assert message in " ".join(shown.output.replace("│", "").split())
    assert not list(tmp_path.iterdir())
