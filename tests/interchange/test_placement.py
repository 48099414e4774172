"""An export appears complete or not at all, and removes nothing that no export wrote."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from folders import tree
from sepme_diffusers import export_checkpoint, export_lora

OF_OTHERS = "is there and is not, or not only, what an export wrote"


def add_file(folder: Path) -> Path:
    (folder / "notes.txt").write_text("mine")
    return folder / "notes.txt"


def add_empty_folder(folder: Path) -> Path:
    (folder / "drafts").mkdir()
    return folder / "drafts"


def add_dangling_link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nothing")
    return folder / "link"


def add_link_to_a_folder(folder: Path) -> Path:
    (folder / "link").symlink_to(folder.parent, target_is_directory=True)
    return folder / "link"


def add_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


CONTENT = [add_file, add_empty_folder, add_dangling_link, add_link_to_a_folder, add_fifo]


@pytest.mark.parametrize("add", CONTENT)
@pytest.mark.parametrize("exported", [False, True])
def test_whatever_no_export_wrote_is_content(add, exported, pipe, text_bank, tmp_path):
    """Alone in the folder, or beside an earlier export."""
    folder = tmp_path / "lora"
    if exported:
        export_lora(text_bank, pipe, ["neon"], folder)
    else:
        folder.mkdir()
    added, before = add(folder), tree(tmp_path)
    with pytest.raises(FileExistsError, match=OF_OTHERS):
        export_lora(text_bank, pipe, ["neon"], folder)
    assert os.path.lexists(added)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize("name", ["lora", "lora.safetensors"])
def test_a_link_in_the_place_of_the_export_stays(name, pipe, text_bank, tmp_path):
    format = "kohya" if name.endswith(".safetensors") else "peft"
    export_lora(text_bank, pipe, ["neon"], tmp_path / f"first-{name}", format)
    for target in (tmp_path / f"first-{name}", tmp_path / "nothing"):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(FileExistsError, match=OF_OTHERS):
            export_lora(text_bank, pipe, ["cat"], tmp_path / name, format)
        assert (tmp_path / name).readlink() == target
        (tmp_path / name).unlink()


def test_a_fifo_in_the_place_of_a_file_is_not_read(pipe, text_bank, tmp_path):
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "lora.safetensors")
    with pytest.raises(FileExistsError, match=OF_OTHERS):
        export_lora(text_bank, pipe, ["cat"], tmp_path / "lora.safetensors", "kohya")
    assert (tmp_path / "lora.safetensors").is_fifo()


def test_what_comes_while_an_export_is_written_stays(pipe, text_bank, tmp_path, monkeypatch):
    def save_slowly(*arguments, **options):
        (tmp_path / "lora").mkdir(exist_ok=True)
        (tmp_path / "lora" / "notes.txt").write_text("mine")
        save_file(*arguments, **options)

    monkeypatch.setattr("sepme_diffusers.interchange.lora_files.save_file", save_slowly)
    with pytest.raises(FileExistsError, match=OF_OTHERS):
        export_lora(text_bank, pipe, ["cat"], tmp_path / "lora")
    assert tree(tmp_path) == {"lora/notes.txt": b"mine"}


def test_an_export_that_cannot_take_its_place_leaves_the_earlier_one(pipe, text_bank, tmp_path, monkeypatch):
    folder = export_lora(text_bank, pipe, ["neon"], tmp_path / "lora")
    before, replace = tree(tmp_path), os.replace

    def interrupted(source, target):
        if Path(target) == folder and Path(source).name != "former":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_lora(text_bank, pipe, ["cat"], folder)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("path", [".", "..", "", "lora/..", "{here}", "{here}/.."])
def test_the_current_folder_is_not_replaced(path, pipe, text_bank, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = path.format(here=tmp_path / "here")
    with pytest.raises(ValueError, match=r"current folder or a folder above it.*give the name of a new one"):
        export_lora(text_bank, pipe, ["neon"], path)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_an_empty_folder_is_filled_and_an_earlier_export_replaced(pipe, text_bank, tmp_path):
    (tmp_path / "lora").mkdir()
    first = tree(export_lora(text_bank, pipe, ["neon"], tmp_path / "lora"))
    second = tree(export_lora(text_bank, pipe, ["cat"], tmp_path / "lora", format="diffusers"))
    assert first.keys() - second.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    file = export_lora(text_bank, pipe, ["neon"], tmp_path / "l.safetensors", format="kohya")
    export_lora(text_bank, pipe, ["cat", "neon"], file, format="kohya")
    export_checkpoint(text_bank, pipe, ["neon"], tmp_path / "lora")  # folders in a folder
    assert "unet/config.json" in tree(export_checkpoint(text_bank, pipe, ["cat"], tmp_path / "lora"))
    assert {path.name for path in tmp_path.iterdir()} == {"lora", "l.safetensors"}


def test_a_file_of_others_is_not_overwritten(pipe, text_bank, tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "mine.safetensors")
    before = tree(tmp_path)
    for export, format in ((export_lora, "kohya"), (export_checkpoint, "single_file")):
        with pytest.raises(FileExistsError, match=OF_OTHERS):
            export(text_bank, pipe, ["neon"], tmp_path / "mine.safetensors", format=format)
    assert tree(tmp_path) == before
