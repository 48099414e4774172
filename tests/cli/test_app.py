"""The command line: help, version, bad options, benchmarks, exports and the demonstration."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from sepme_diffusers import pocket
from sepme_diffusers.cli.app import app
from sepme_diffusers.evaluation.bench import registry
from sepme_diffusers.evaluation.bench.measure import Figure, Measure


def test_help_names_the_commands():
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert "demo" in shown.output
    assert "bench" in shown.output


def test_the_version_is_that_of_the_package():
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert shown.output == f"sepme-diffusers {version('sepme-diffusers')}\n"


def test_the_bare_import_is_light():
    """Neither torch nor what only the command line needs."""
    check = "import sys, sepme_diffusers; sys.exit(bool({'torch', 'typer', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_bank_is_read_without_what_draws():
    """These take seconds to import, which whoever verifies or pulls a bank need not wait for."""
    heavy = "{'diffusers', 'peft', 'transformers', 'typer', 'rich'}"
    check = f"import sys, sepme_diffusers; sepme_diffusers.ConceptBank; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_only_the_command_line_imports_what_it_alone_needs():
    package = Path(pocket.__file__).parents[1]
    importing = {
        file.relative_to(package).parts[0]
        for file in package.rglob("*.py")
        if re.search(r"^\s*(import|from) (typer|rich)\b", file.read_text("utf-8"), re.MULTILINE)
    }
    assert importing == {"cli"}


def test_bad_options_are_refused_before_any_work():
    shown = CliRunner().invoke(app, ["demo", "--objects", "0"])
    assert shown.exit_code == 2
    assert "--objects" in shown.output


@pytest.mark.parametrize(
    ("option", "value", "valid"), [("--only", "speed", "switching"), ("--dtype", "int8", "float16")]
)
def test_bench_names_what_is_valid(option, value, valid):
    shown = CliRunner().invoke(app, ["bench", option, value])
    assert shown.exit_code == 2
    assert value in shown.output
    assert valid in shown.output


def test_bench_hands_its_options_to_the_measures(monkeypatch):
    def measured(runner):
        yield Figure("options", f"{runner.device} {runner.dtype} {runner.repeats} {runner.steps}", "")

    monkeypatch.setitem(registry.MEASURES, "switching", Measure("switching", "", "", measured))
    options = ["--dtype", "float16", "--repeats", "3", "--steps", "20", "--only", "switching"]
    shown = CliRunner().invoke(app, ["bench", *options])
    assert shown.exit_code == 0, shown.output
    assert "cpu torch.float16 3 20" in " ".join(shown.output.replace("│", " ").split())


def test_bench_shows_what_it_measured_before_a_measure_that_fails(monkeypatch):
    """Whoever waited an hour keeps the figures, and the failure is told."""

    def measured(_):
        yield Figure("switching the erased set", "345 x", "one pair")

    def failing(_):
        raise RuntimeError("out of memory")

    for name, run in (("switching", measured), ("disk_text", failing)):
        monkeypatch.setitem(registry.MEASURES, name, Measure(name, ">= 100 x faster", "set_adapters", run))
    shown = CliRunner().invoke(app, ["bench", "--only", "switching", "--only", "disk_text"])
    assert "345 x" in shown.output
    assert shown.exit_code == 1
    assert str(shown.exception) == "out of memory"


def test_the_command_line_imports_nothing_heavy():
    """The first line appears at once: torch waits until a command runs."""
    check = "import sys, sepme_diffusers.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


BANK = str(Path(pocket.__file__).parent / "banks" / "styles")


def exported(*options: str):
    return CliRunner().invoke(app, ["export", BANK, "--base", str(pocket.path()), *options])


@pytest.mark.parametrize(
    ("format", "output", "file"),
    [
        ("kohya", "l.safetensors", "l.safetensors"),
        ("peft", "l", "l/adapter_config.json"),
        ("diffusers", "l", "l/pytorch_lora_weights.safetensors"),
        ("checkpoint", "l", "l/model_index.json"),
        ("single-file", "l.safetensors", "l.safetensors"),
    ],
)
def test_export_writes_every_format(format, output, file, tmp_path):
    options = ["--erased", "neon", "--erased", "woodcut=0.5", "--dtype", "float16"]
    shown = exported(*options, "--format", format, "--output", str(tmp_path / output))
    assert shown.exit_code == 0, shown.output
    assert "erases neon, woodcut" in " ".join(shown.output.split())
    assert (tmp_path / file).is_file()
    if output.endswith(".safetensors"):
        with safe_open(tmp_path / file, "pt") as opened:
            assert json.loads(opened.metadata()["sepme_export"])["erased"] == {"neon": 1.0, "woodcut": 0.5}


def test_export_refuses_in_one_sentence(tmp_path):
    shown = exported("--erased", "neno", "--output", str(tmp_path / "l.safetensors"))
    assert shown.exit_code == 2
    assert "Did you mean 'neon'" in " ".join(shown.output.replace("│", "").split())
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> tuple[str, str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "sepme_diffusers.cli", "demo", "--output", str(folder), "--objects", "2"]
    wide = os.environ | {"COLUMNS": "160"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=wide)
    first = process.stdout.readline()
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return first, output, folder


@pytest.mark.slow
def test_demo_erases_guards_and_restores(shown):
    """On a quarter of its pictures the demonstration's table says what the method promises."""
    first, output, folder = shown
    assert first.startswith("Loading")
    row = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in output.splitlines() if line.startswith("│")}
    numbers = {name: [float(cell) for cell in cells if cell.strip()] for name, cells in row.items()}
    original, erased, _ = numbers["erased: style ACC %"]
    assert original >= 85
    assert erased <= 10
    assert min(numbers["restored: style ACC %"]) >= 85
    assert max(numbers["guarded: max, /255"]) == 0
    assert max(numbers["restored: max, /255"]) == 0
    assert (folder / "grid.png").stat().st_size > 10_000
    assert "Six increments made from their names" in (folder / "report.html").read_text("utf-8")
