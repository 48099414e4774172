"""Everything that README and docs/ show as Python is run, and README's commands are the ones that CI runs."""

import re
from pathlib import Path

import pytest

import hub
import sepme_diffusers
from sepme_diffusers.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text("utf-8")) if found == language]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    with hub.running() as server:
        server.use(monkeypatch, tmp_path / "cache")
        for code in blocks(page, "python"):
            exec(compile(code, str(page), "exec"), namespace)


def test_readme_commands_are_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    commands = [line for code in blocks(ROOT / "README.md", "bash") for line in code.splitlines()]
    assert commands == [
        "pip install -c constraints.txt . && sepme demo",
        'pip install -c constraints.txt ".[test]" && pytest',
    ]
    assert all(f"\n{command}\n" in ci for command in commands)


def test_the_reference_names_everything_that_is_public():
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert [name for name in sepme_diffusers.__all__ if f"`{name}" not in text] == []
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert [name for name in commands if f"`sepme {name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text("utf-8"))
    broken = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not broken


def test_the_packaged_card_snippet_runs(tmp_path, monkeypatch):
    """The snippet in the model card of a shipped bank works with that bank."""
    from sepme_diffusers import pocket

    folder = Path(pocket.__file__).parent / "banks" / "styles"
    snippet = blocks(folder / "README.md", "python")[0]
    snippet = re.sub(r'from_pretrained\(".*?"\)', f"from_pretrained({str(pocket.path())!r})", snippet)
    snippet = snippet.replace('"path/or/repository/of/this/bank"', repr(str(folder)))
    namespace: dict = {}
    exec(compile(snippet, "card", "exec"), namespace)
    assert len(namespace["pipe"].erased) == 1
