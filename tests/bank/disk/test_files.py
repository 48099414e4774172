import os

import pytest

from sepme_diffusers.bank.disk.files import replace_file


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    file = tmp_path / "x.json"
    for data in (b"old", b"new"):
        replace_file(file, data)
        assert file.read_bytes() == data
    assert list(tmp_path.iterdir()) == [file]


def test_it_is_readable_by_others_as_far_as_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        replace_file(tmp_path / "x", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A loss of power leaves the old file or the new one: the content is flushed first, the name afterwards."""
    steps = []
    sync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("fsync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replace"), move(*paths)))
    replace_file(tmp_path / "x", b"data")
    assert steps == ["fsync", "replace", "fsync"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    replace_file(tmp_path / "x", b"old")
    with pytest.raises(TypeError):
        replace_file(tmp_path / "x", "text")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]
