"""One bank, byte for byte, however many processes made it; a failure in one is a failure in all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MAKE = """
import os
import sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
from small import CONCEPTS, TRAIN, random_pipeline
from sepme_diffusers import SepMETrainer

concepts = CONCEPTS  # three, which two processes cannot share evenly

def make(rate, folder):
    config = replace(TRAIN, max_steps=2, min_steps=2, learning_rate=rate)
    bank = SepMETrainer(random_pipeline(), config).erase(concepts)
    if os.environ.get("RANK", "0") == "0":
        bank.save_pretrained(folder)
    assert list(bank) == [concept.name for concept in concepts]

make(0.1, {folder!r})
print("made with", os.environ.get("WORLD_SIZE", "1"), flush=True)
"""
FAIL = """
make(1e30, {folder!r} + "-failed")
"""


def script(text: str, folder: Path) -> str:
    return text.format(tests=str(Path(__file__).parents[1]), folder=str(folder))


def launch(n: int, text: str, folder: Path) -> subprocess.CompletedProcess:
    file = folder.with_suffix(".py")
    file.write_text(script(text, folder))
    # Not `accelerate launch --cpu`, which starts one process whatever number it is given.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), str(file)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=settings)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    """The bank's files as this process makes them, on as many threads as the others have."""
    folder, threads = tmp_path_factory.mktemp("alone") / "bank", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exec(compile(script(MAKE, folder), "script", "exec"), {})
    finally:
        torch.set_num_threads(threads)
    return tree(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """Two processes that make a bank and then fail."""
    folder = tmp_path_factory.mktemp("two") / "bank"
    return launch(2, MAKE + FAIL, folder), folder


def test_two_processes_make_the_bytes_of_one(alone, two):
    done, folder = two
    assert done.stdout.count("made with 2") == 2, done.stderr[-3000:]
    assert len(alone) > 5
    assert tree(folder) == alone


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4])
def test_the_banks_bytes_are_equal_for_any_number_of_processes(n, alone, tmp_path):
    done = launch(n, MAKE, tmp_path / "bank")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"made with {n}") == n
    assert tree(tmp_path / "bank") == alone


def test_a_failure_in_one_process_ends_all_and_nothing_is_written(two):
    done, folder = two
    assert done.returncode != 0
    assert "FloatingPointError" in done.stderr
    assert folder.exists()
    assert not folder.with_name("bank-failed").exists()


@pytest.mark.parametrize("size", ["1", "not set"])
def test_alone_it_is_done_here_in_order(size, monkeypatch):
    from sepme_diffusers.making.distribute import shared_out

    if size == "1":
        monkeypatch.setenv("WORLD_SIZE", "1")
    else:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert shared_out([3, 1, 2], lambda job: 10 * job) == [30, 10, 20]
