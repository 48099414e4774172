import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from folders import SHARD
from sepme_diffusers import BankError, Increment
from sepme_diffusers.bank.disk.held import HeldFile
from sepme_diffusers.bank.disk.shards import ShardFile, shards_of
from sepme_diffusers.bank.rows import as_rows, digest


def increments(n: int = 5) -> dict[str, Increment]:
    torch.manual_seed(0)
    return {str(i): Increment(torch.randn(i + 1, 8), B=torch.randn(8, i + 1)) for i in range(n)}


def written(folder: Path, rows: dict[str, dict[str, torch.Tensor]]) -> tuple[ShardFile, dict]:
    (shard,) = shards_of(rows.items())
    (folder / shard.name).write_bytes(shard.data)
    return ShardFile(HeldFile.opened(folder / shard.name)), dict(shard.places)


@pytest.fixture
def rows() -> dict[str, dict[str, torch.Tensor]]:
    return {name: as_rows(increment) for name, increment in increments().items()}


def test_every_increment_comes_back_exactly(rows, tmp_path):
    shard, places = written(tmp_path, rows)
    for name, own in rows.items():
        back = shard.rows(places[name], digest(own))
        assert back.keys() == own.keys()
        assert all(torch.equal(back[key], own[key]) for key in own)
    assert SHARD.fullmatch(shard.path.name)


def test_rows_stand_side_by_side_for_any_reader_of_safetensors(rows):
    (shard,) = shards_of(rows.items())
    tensors = load(shard.data)
    assert torch.equal(tensors["tokens.A"], torch.cat([own["tokens.A"] for own in rows.values()]))
    assert shard.name == f"increments-{shard.sha256[:16]}.safetensors"


def test_one_shard_holds_increments_of_one_kind():
    torch.manual_seed(0)
    a, b, pooled = torch.randn(2, 8), torch.randn(8, 2), Increment(torch.ones(1, 6), B=torch.ones(6, 1))
    kinds = {
        "a": Increment(a, B=b), "b": Increment(a, B=b.half()), "c": Increment(a, C={"x": b}),
        "d": Increment(a, B=b, doors={"pooled": pooled}), "e": Increment(a, B=2 * b),
    }  # fmt: skip
    shards = list(shards_of((name, as_rows(increment)) for name, increment in kinds.items()))
    assert sorted("".join(sorted(shard.places)) for shard in shards) == ["ae", "b", "c", "d"]


def test_a_shard_is_closed_when_it_is_full():
    """A few concepts of very many can be read and downloaded alone."""
    row = {"tokens.A": torch.zeros(64, 4096), "tokens.B": torch.zeros(64, 4096)}  # 2 MiB
    shards = list(shards_of((str(i), row) for i in range(9)))
    assert [len(shard.places) for shard in shards] == [4, 4, 1]


def test_a_file_that_changed_after_it_was_opened_gives_an_error_and_not_other_numbers(rows, tmp_path):
    """Of the concept that was changed; the others stay readable."""
    shard, places = written(tmp_path, rows)
    data = bytearray(shard.path.read_bytes())
    data[-1] ^= 1  # in the last row of tokens.B, which is the last concept's
    with shard.path.open("r+b") as file:
        file.write(data)
    with pytest.raises(BankError, match="damaged or was changed"):
        shard.rows(places["4"], digest(rows["4"]))
    assert shard.rows(places["0"], digest(rows["0"]))


def test_a_file_that_is_cut_short_gives_an_error_and_not_a_dead_process(rows, tmp_path):
    shard, places = written(tmp_path, rows)
    os.truncate(shard.path, 100)
    with pytest.raises(BankError, match=r"does not hold the rows|damaged"):
        shard.rows(places["4"], digest(rows["4"]))


def test_a_file_that_is_replaced_or_removed_stays_readable(rows, tmp_path):
    shard, places = written(tmp_path, rows)
    (tmp_path / "other").write_bytes(b"other")
    os.replace(tmp_path / "other", shard.path)
    assert shard.rows(places["1"], digest(rows["1"]))
    shard.path.unlink()
    assert shard.rows(places["4"], digest(rows["4"]))


@pytest.mark.parametrize("place", [(0, 16), (15, 16), (14, 15), (-1, 1), (1, 1), (2, 1), (2**60, 2**60 + 1)])
def test_rows_that_are_not_there_are_refused(rows, tmp_path, place):
    shard, _ = written(tmp_path, rows)
    with pytest.raises(BankError, match=r"does not hold the rows|damaged"):
        shard.rows({"tokens": place}, digest(rows["4"]))
    with pytest.raises(BankError):
        shard.rows({"pooled": place}, digest(rows["4"]))


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 7, b"\0" * 8, b"\xff" * 9, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"null",
     struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 40_000) + b"[" * 40_000, struct.pack("<Q", 2) + b"\xff\xff",
     struct.pack("<Q", 5 * 2**20) + b" " * 5 * 2**20],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_refused(data, tmp_path):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(BankError, match=str(tmp_path)):
        ShardFile(HeldFile.opened(tmp_path / "x")).rows({"tokens": (0, 1)}, "0" * 64)


@pytest.mark.parametrize(
    "said",
    [None, [], 3, {}, {"dtype": "F32"}, {"dtype": "F8_E4M3"}, {"dtype": []}, {"shape": [1]}, {"shape": [1, "8"]},
     {"shape": [1, 0]}, {"shape": [2**62, 2**62]}, {"shape": [True, 8]}, {"shape": [1, -8]}, {"shape": None},
     {"data_offsets": [-32, 0]}, {"data_offsets": [0, 2**62]}, {"data_offsets": [0, 31]}, {"data_offsets": [0]},
     {"data_offsets": [64, 96]}, {"data_offsets": [0.0, 32.0]}],
)  # fmt: skip
def test_headers_that_lie_are_refused(said, tmp_path):
    true = {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]}
    header = {
        "tokens.A": {**true, **said} if isinstance(said, dict) and said else said,
        "tokens.B": {**true, "data_offsets": [32, 64]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(BankError, match=r"does not hold the rows|damaged"):
        ShardFile(HeldFile.opened(tmp_path / "x")).rows({"tokens": (0, 1)}, "0" * 64)


def test_processes_that_were_forked_read_at_once(rows, tmp_path):
    """They share the open file, and so its position, were there one."""
    shard, places = written(tmp_path, rows)
    expected = {name: digest(own) for name, own in rows.items()}
    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            try:
                for _ in range(300):
                    for name in rows:
                        shard.rows(places[name], expected[name])
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def test_what_is_saved_is_what_the_library_saves(rows):
    (shard,) = shards_of(rows.items())
    assert save(load(shard.data), {"format": "pt"}) == shard.data
