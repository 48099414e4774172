"""Saving dies, or happens twice at once: the folder holds a whole bank, and the next save leaves nothing behind."""

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from folders import manifest_of, same, tree
from hub import serving
from sepme_diffusers import BankError, Concept, ConceptBank
from sepme_diffusers.bank.disk.layout import CARD, LOCK, MANIFEST
from tiny import tiny_bank

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

SAVED, REFUSED = 0, 3


def grown(bank: ConceptBank) -> ConceptBank:
    """The bank with ten more concepts, five of either form."""
    return bank.with_entries(
        replace(entry, concept=Concept(f"{name} {i}", entry.concept.pairs))
        for name, entry in bank.items()
        for i in range(5)
    )


OLD = tiny_bank(0)
NEW = {"save": tiny_bank(1), "add": grown(OLD), "first save": grown(tiny_bank(2))}


def forked(work: Callable[[], object]) -> int:
    """The process id of a child that does the work."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            work()
            code = SAVED
        except BankError:
            code = REFUSED
        finally:
            os._exit(code)
    return child


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(moment: float, work: Callable[[], object]) -> None:
    child = forked(work)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    assert code_of(child) in (SAVED, -signal.SIGKILL)


def prepare(folder: Path, kind: str) -> None:
    if kind != "first save":
        OLD.save_pretrained(folder)


def held(folder: Path) -> ConceptBank | None:
    return ConceptBank.from_pretrained(folder) if (folder / MANIFEST).exists() else None


def assert_nothing_left_over(folder: Path, bank: ConceptBank) -> None:
    assert same(ConceptBank.from_pretrained(folder), bank)
    manifest = manifest_of(folder)
    loras = [record["folder"] for record in manifest["concepts"].values() if "folder" in record]
    assert len(loras) == sum(entry.increment.form == "module" for entry in bank.values())
    assert len(tree(folder)) == 2 + len(manifest["shards"]) + 2 * len(loras)
    assert {path.name for path in folder.iterdir()} == {MANIFEST, CARD, *manifest["shards"], *loras}


@pytest.mark.parametrize("kills", [pytest.param(10, id="10"), pytest.param(200, id="200", marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills, tmp_path):
    """After every SIGKILL the old bank or the new one is there, whole, and the next save works and tidies up."""
    rng = random.Random(0)
    began = time.perf_counter()
    grown(OLD).save_pretrained(tmp_path / "timed")
    duration = time.perf_counter() - began
    seen = {"old": 0, "new": 0}
    for i in range(kills):
        kind = list(NEW)[i % len(NEW)]
        folder, new = tmp_path / str(i), NEW[kind]
        prepare(folder, kind)
        kill_at(rng.uniform(0, 1.5 * duration), lambda folder=folder, new=new: new.save_pretrained(folder))
        found = held(folder)
        old = found is None if kind == "first save" else found is not None and same(found, OLD)
        assert old or same(found, new), (i, kind)
        seen["old" if old else "new"] += 1
        OLD.save_pretrained(folder)
        assert_nothing_left_over(folder, OLD)
    # So few do not tell: they may all come early, or late.
    assert kills < 100 or min(seen.values()) > kills // 20, seen


@pytest.mark.parametrize("kills", [pytest.param(10, id="10"), pytest.param(200, id="200", marks=pytest.mark.slow)])
def test_a_pull_killed_at_any_moment(kills, tmp_path):
    """Whatever a dead pull left in the cache: without the network a whole bank or an error, with it the whole bank."""
    bank, rng = grown(OLD), random.Random(1)
    bank.save_pretrained(tmp_path / "bank")
    whole = 0
    with serving(tmp_path / "bank", "me/bank") as (endpoint, _):

        def pull(cache: Path, **options: object) -> ConceptBank:
            return ConceptBank.from_pretrained("me/bank", cache_dir=cache, endpoint=endpoint, **options)

        began = time.perf_counter()
        pull(tmp_path / "timed")
        duration = time.perf_counter() - began
        for i in range(kills):
            cache = tmp_path / str(i)
            kill_at(rng.uniform(0, 1.2 * duration), lambda cache=cache: pull(cache))
            try:
                assert same(pull(cache, local_files_only=True), bank)
                whole += 1
            except (BankError, FileNotFoundError):
                pass
            assert same(pull(cache), bank)
    assert kills < 100 or kills // 20 < whole < kills


@pytest.mark.parametrize("rounds", [pytest.param(10, id="10"), pytest.param(100, id="100", marks=pytest.mark.slow)])
def test_of_two_savers_one_wins_whole(rounds, tmp_path):
    """Each gets its bank saved or an error; what is there is whole, and one of those that were saved."""
    refused = 0
    for i in range(rounds):
        folder = tmp_path / str(i)
        OLD.save_pretrained(folder)
        banks = [grown(tiny_bank(seed)) for seed in (1, 2)]
        children = [forked(lambda bank=bank, folder=folder: bank.save_pretrained(folder)) for bank in banks]
        codes = [code_of(child) for child in children]
        assert set(codes) <= {SAVED, REFUSED}
        assert SAVED in codes
        refused += codes.count(REFUSED)
        winners = [bank for bank, code in zip(banks, codes, strict=True) if code == SAVED]
        (winner,) = [bank for bank in winners if same(ConceptBank.from_pretrained(folder), bank)]
        assert_nothing_left_over(folder, winner)
    assert rounds < 100 or refused


@pytest.mark.parametrize("times", [pytest.param(20, id="20"), pytest.param(200, id="200", marks=pytest.mark.slow)])
def test_reading_while_another_process_saves_gives_a_whole_bank_every_time(times, tmp_path):
    """Each read is of a bank that was saved, however often its files went away under the reader.

    Its numbers, which are read last, are those of that bank too.
    """
    banks = [tiny_bank(seed) for seed in range(40)]
    saved = {bank.digest: bank for bank in banks}
    banks[0].save_pretrained(tmp_path)
    writer = forked(lambda: [bank.save_pretrained(tmp_path) for bank in itertools.cycle(banks)])
    last, changes = banks[0].digest, 0
    try:
        while changes < times:
            assert os.waitpid(writer, os.WNOHANG) == (0, 0), "the writer died"
            bank = ConceptBank.from_pretrained(tmp_path)
            assert same(bank, saved[bank.digest])
            last, changes = bank.digest, changes + (bank.digest != last)
    finally:
        os.kill(writer, signal.SIGKILL)
        code_of(writer)


def test_a_lock_that_is_held_refuses_and_a_dead_holder_does_not(tmp_path):
    OLD.save_pretrained(tmp_path)
    before = tree(tmp_path)
    with FileLock(tmp_path / LOCK), pytest.raises(BankError, match="another process is saving"):
        NEW["save"].save_pretrained(tmp_path)
    assert {file: data for file, data in tree(tmp_path).items() if file != LOCK} == before
    # The lock's holder dies; its file stays, and is no lock.
    child = forked(lambda: (FileLock(tmp_path / LOCK).acquire(), os.kill(os.getpid(), signal.SIGKILL)))
    assert code_of(child) == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    NEW["save"].save_pretrained(tmp_path)
    assert_nothing_left_over(tmp_path, NEW["save"])


def test_saving_a_bank_that_is_killed_again_and_again(tmp_path):
    """Leftovers of several interrupted saves do not pile up."""
    OLD.save_pretrained(tmp_path)
    for seed in range(8):
        kill_at(0.01, lambda seed=seed: grown(tiny_bank(seed)).save_pretrained(tmp_path))
    NEW["save"].save_pretrained(tmp_path)
    assert_nothing_left_over(tmp_path, NEW["save"])
