"""`sepme explain`: the reasons on the terminal, and as JSON."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sepme_diffusers import pocket
from sepme_diffusers.cli.app import app

STYLES = str(Path(pocket.__file__).parent / "banks" / "styles")


def explained(*arguments: str):
    return CliRunner().invoke(app, ["explain", str(pocket.path()), STYLES, *arguments], terminal_width=200)


def words(output: str) -> str:
    return " ".join(output.replace("│", " ").split())


def test_it_shows_a_sentence_and_a_table_for_each_prompt():
    shown = explained("a neon [b]fox[/b]", "", "--concept", "neon", "--concept", "woodcut")
    assert shown.exit_code == 0, shown.output
    assert "'a neon [b]fox[/b]': neon would act if erased (reads 1." in shown.output
    assert "'': neon would not (reads nothing); woodcut would not (reads nothing)" in words(shown.output)
    assert "neon no if erased neon tokens" in words(shown.output)


def test_as_json_it_prints_nothing_else():
    shown = explained("a neon fox", "--limit", "2", "--json")
    assert shown.exit_code == 0, shown.output
    (prompt,) = json.loads(shown.stdout)["prompts"]
    assert prompt["concepts"][0]["concept"] == "neon"
    assert (len(prompt["concepts"]), prompt["more_act"]) == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a fox", "--concept", "noen"], "Did you mean 'neon'"),
        (["a fox", "--limit", "0"], "--limit"),
        ([], "PROMPT"),
    ],
)
def test_it_refuses_in_one_sentence(arguments, message):
    shown = explained(*arguments)
    assert shown.exit_code == 2
    assert message in words(shown.output)
