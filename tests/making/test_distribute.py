"""One bank, byte for byte, however many processes made it; a failure in one is a failure in all."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
from small import CLOSED, CONCEPTS, TRAIN, random_pipeline
from sepme_diffusers import Concept, ConceptBank, SepMETrainer
from accelerate import PartialState

config = replace(TRAIN, max_steps=4, min_steps=4, n_images=2, learning_rate={rate})
concepts = [*CONCEPTS, Concept("woodcut", (("woodcut cat", "a cat"),)), Concept("fox", (("a fox", ""),))]
bank = SepMETrainer(random_pipeline(), config).erase(concepts)
if PartialState().is_main_process:
    bank.save_pretrained({folder!r})
else:
    assert list(bank) == [concept.name for concept in concepts]
"""


def launch(n: int, folder: Path, rate: float = 0.1) -> subprocess.CompletedProcess:
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(folder), rate=rate))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(n), "--num_machines", "1",
        "--num_cpu_threads_per_process", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(script),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("numbers", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_the_banks_bytes_are_equal_for_any_number_of_processes(tmp_path, numbers):
    for n in numbers:
        done = launch(n, tmp_path / str(n))
        assert done.returncode == 0, done.stderr[-3000:]
    one, *others = (tree(tmp_path / str(n)) for n in numbers)
    assert all(one == other for other in others)
    assert len(one) > 5


def test_a_failure_in_one_process_ends_all_and_nothing_is_written(tmp_path):
    done = launch(2, tmp_path / "bank", rate=1e30)
    assert done.returncode != 0
    assert "FloatingPointError" in done.stderr
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("size", ["1", "not set"])
def test_alone_it_is_done_here_in_order(size, monkeypatch):
    from sepme_diffusers.making.distribute import shared_out

    if size == "1":
        monkeypatch.setenv("WORLD_SIZE", "1")
    else:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert shared_out([3, 1, 2], lambda job: 10 * job) == [30, 10, 20]
