"""`sepme preview` on the built-in model: interrupted and gone on with, and what it refuses."""

import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from sepme_diffusers import pocket
from sepme_diffusers.cli.app import app

BASE, BANK = str(pocket.path()), str(Path(pocket.__file__).parent / "banks" / "styles")
OPTIONS = ["--erased", "neon", "--prompts", "1", "--steps", "3", "--guidance", "4", "--judge", "pocket"]
PICTURES = 9  # one own prompt, one neighbour and one regular prompt, at three moments


def run(*options: object):
    return CliRunner().invoke(app, ["preview", *map(str, options)])


def pictures(output: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in (output / "pictures").glob("*.png")}


def killed_after_the_first_picture(output: Path) -> None:
    """Run it in a process of its own, forked so that nothing is imported anew, and kill that."""
    if (child := os.fork()) == 0:
        try:
            run(BASE, BANK, *OPTIONS, "--output", output)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 120
    while not pictures(output) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it ended by itself"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_run_that_was_killed_is_gone_on_with_and_gives_the_same_page(tmp_path):
    killed_after_the_first_picture(tmp_path / "killed")
    before = pictures(tmp_path / "killed")
    assert 1 <= len(before) < PICTURES
    assert not (tmp_path / "killed" / "report.html").exists()
    for output in ("killed", "whole"):
        shown = run(BASE, BANK, *OPTIONS, "--output", tmp_path / output)
        assert shown.exit_code == 0, shown.output
        assert "neon" in shown.output
    after = pictures(tmp_path / "killed")
    assert len(after) == PICTURES
    assert before.items() <= after.items()
    for name in ("report.html", "grid.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert "the built-in judge" in (tmp_path / "whole" / "report.html").read_text("utf-8")
    assert Image.open(tmp_path / "whole" / "grid.png").height > 3 * 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--erased", "neno"), "Did you mean 'neon'"),
        (("--judge", "no/such/judge"), "there is no judge 'no/such/judge'"),
        (("--output", "file"), "choose another output folder"),
        (("--steps", "0"), "--steps"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    shown = run("no-such-base", BANK, *options)
    assert shown.exit_code == 2
    assert message in " ".join(shown.output.replace("│", "").split())


def test_an_empty_bank_is_refused(tmp_path):
    pocket.bank("styles").subset([]).save_pretrained(tmp_path / "empty")
    shown = run(BASE, tmp_path / "empty", "--output", tmp_path / "out")
    assert shown.exit_code == 2
    assert "the bank has no concepts" in " ".join(shown.output.replace("│", "").split())
