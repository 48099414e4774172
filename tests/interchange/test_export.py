"""Each format is read back by the other side's own code and must give our pipeline's latents."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from folders import tree
from sepme_diffusers import SepMEPipeline, SepMETrainer, export_adapters, export_checkpoint, export_lora
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.doors.registry import register
from sepme_diffusers.doors.unet import UNET
from small import CLOSED, CONCEPTS, draw, random_pipeline, random_xl_pipeline

ERASED = {"woodcut": 1.0, "neon": 1.5, "pencil": 0.5}


def plain(pipe, kind=StableDiffusionPipeline):
    """A pipeline of equal weights that nothing of this package has touched."""
    extra = {"requires_safety_checker": False} if kind is StableDiffusionPipeline else {"add_watermarker": False}
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict())
    made = kind(**{**pipe.components, "unet": unet.eval()}, **extra)
    made.set_progress_bar_config(disable=True)
    return made


def ours(pipe, bank, erased):
    pipe.load_sepme(bank)
    pipe.set_erased(erased)
    made = draw(pipe)
    pipe.set_erased([])
    assert (made - draw(pipe)).abs().max() > 1e-2  # there is something to be reproduced
    pipe.unload_sepme()
    return made


def agree(theirs, expected):
    torch.testing.assert_close(draw(theirs), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def expected(mixed_bank):
    return ours(random_pipeline(), mixed_bank, ERASED)


@pytest.fixture(scope="module")
def xl():
    """The small SDXL with a bank, and the latents that its erasure gives."""
    pipe = random_xl_pipeline()
    bank = SepMETrainer(pipe, replace(CLOSED, rank=3), guards=["watermark"]).erase(CONCEPTS[:2])
    erased = {"neon": 20.0, "cat": 10.0}
    return pipe, bank, erased, ours(pipe, bank, erased)


def test_peft_reads_one_folder_for_the_whole_set(pipe, mixed_bank, expected, tmp_path):
    folder = export_lora(mixed_bank, pipe.unet, ERASED, tmp_path / "lora")
    theirs = plain(pipe)
    theirs.unet = PeftModel.from_pretrained(theirs.unet, folder).get_base_model()
    agree(theirs, expected)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == sum(mixed_bank[name].increment.rank for name in ERASED)


def test_peft_combines_the_concepts_folders(pipe, mixed_bank, expected, tmp_path):
    folders = export_adapters(mixed_bank, pipe, tmp_path / "adapters")
    assert {name: folder.name for name, folder in folders.items()} == {name: name for name in mixed_bank}
    theirs = plain(pipe)
    model = None
    for name, folder in folders.items():
        if model is None:
            model = PeftModel.from_pretrained(theirs.unet, folder, adapter_name=name)
        else:
            model.load_adapter(folder, name)
    model.add_weighted_adapter(list(ERASED), list(ERASED.values()), "erased", combination_type="cat")
    model.set_adapter("erased")
    theirs.unet = model.get_base_model()
    agree(theirs, expected)


def test_concepts_with_one_slug_get_folders_of_their_own(pipe, text_bank, tmp_path):
    twins = [text_bank["neon"].renamed(name) for name in ("Neon!", "neon?")]
    folders = export_adapters(text_bank.with_entries(twins), pipe, tmp_path / "adapters")
    assert len({*folders.values()}) == len(text_bank) + 2
    assert all((folder / "adapter_config.json").is_file() for folder in folders.values())


def test_diffusers_reads_a_peft_folder_into_the_unet(pipe, mixed_bank, expected, tmp_path):
    folder = export_lora(mixed_bank, pipe, ERASED, tmp_path / "lora")
    theirs = plain(pipe)
    theirs.unet.load_lora_adapter(folder, prefix="base_model.model", weight_name="adapter_model.safetensors")
    agree(theirs, expected)


def test_diffusers_reads_its_own_folder(pipe, mixed_bank, expected, tmp_path):
    folder = export_lora(mixed_bank, pipe, ERASED, tmp_path / "lora", format="diffusers")
    theirs = plain(pipe)
    theirs.load_lora_weights(folder)
    agree(theirs, expected)
    theirs.unload_lora_weights()
    assert torch.equal(draw(theirs), draw(plain(pipe)))


def test_diffusers_adds_up_several_adapters(pipe, mixed_bank, expected, tmp_path):
    theirs = plain(pipe)
    for name in ERASED:
        theirs.load_lora_weights(
            export_lora(mixed_bank, pipe, [name], tmp_path / name, format="diffusers"), adapter_name=name
        )
    theirs.set_adapters(list(ERASED), list(ERASED.values()))
    agree(theirs, expected)


def test_diffusers_reads_a_kohya_file(pipe, mixed_bank, expected, tmp_path):
    file = export_lora(mixed_bank, pipe, ERASED, tmp_path / "erased.safetensors", format="kohya")
    theirs = plain(pipe)
    theirs.load_lora_weights(tmp_path, weight_name=file.name)
    agree(theirs, expected)


def apply_kohya(file: Path, modules: dict[str, torch.nn.Module]) -> None:
    """What every reader of kohya files does: W += up · down · alpha / rank, modules found by their flattened names."""
    tensors = load_file(file)
    flattened = {"lora_unet_" + name.replace(".", "_"): module for name, module in modules.items()}
    for key in {key.split(".")[0] for key in tensors}:
        up, down, alpha = (tensors.pop(f"{key}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        flattened[key].weight.data += up @ down * (alpha / len(down))
    assert not tensors


def test_a_kohya_file_follows_the_published_scheme(pipe, mixed_bank, expected, tmp_path):
    file = export_lora(mixed_bank, pipe, ERASED, tmp_path / "erased.safetensors", format="kohya")
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight" in load_file(file)
    theirs = plain(pipe)
    apply_kohya(file, dict(theirs.unet.named_modules()))
    agree(theirs, expected)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "networks.lora"
        assert json.loads(opened.metadata()["sepme_export"])["erased"] == {"neon": 1.5, "pencil": 0.5, "woodcut": 1.0}


def test_an_sdxl_kohya_file_has_the_original_names(xl, tmp_path, caplog):
    """At the true SDXL's layout the module sits where sd-scripts looks for it; diffusers reads the file back."""
    pipe, bank, erased, expected = xl
    file = export_lora(bank, pipe, erased, tmp_path / "erased.safetensors", format="kohya")
    keys = {key.split(".")[0] for key in load_file(file)}
    assert "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k" in keys
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_v" in keys
    assert "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_v" in keys
    assert "lora_unet_label_emb_0_0" in keys
    assert "sd-scripts passes it over" in caplog.text
    assert len(keys) == len(projection_weights(pipe.unet)) + 1
    theirs = plain(pipe, StableDiffusionXLPipeline)
    theirs.load_lora_weights(tmp_path, weight_name=file.name)
    agree(theirs, expected)


def test_the_other_lora_formats_serve_sdxl(xl, tmp_path):
    pipe, bank, erased, expected = xl
    theirs = plain(pipe, StableDiffusionXLPipeline)
    theirs.load_lora_weights(export_lora(bank, pipe, erased, tmp_path / "lora", format="diffusers"))
    agree(theirs, expected)
    theirs.unload_lora_weights()
    folder = export_lora(bank, pipe, erased, tmp_path / "peft")
    theirs.unet.load_lora_adapter(folder, prefix="base_model.model", weight_name="adapter_model.safetensors")
    agree(theirs, expected)
    theirs = plain(pipe, StableDiffusionXLPipeline)
    theirs.unet = PeftModel.from_pretrained(theirs.unet, folder).get_base_model()
    agree(theirs, expected)


def test_peft_combines_the_folders_of_sdxl_concepts(xl, tmp_path):
    pipe, bank, erased, expected = xl
    folders = export_adapters(bank, pipe, tmp_path / "adapters")
    theirs = plain(pipe, StableDiffusionXLPipeline)
    model = PeftModel.from_pretrained(theirs.unet, folders["neon"], adapter_name="neon")
    model.load_adapter(folders["cat"], "cat")
    model.add_weighted_adapter(list(erased), list(erased.values()), "erased", combination_type="cat")
    model.set_adapter("erased")
    theirs.unet = model.get_base_model()
    agree(theirs, expected)


def test_the_pooled_edit_is_a_change_of_the_columns_that_read_it(xl, tmp_path):
    """[W B A, 0]: what reads the picture's sizes stays as it is. Without the change the latents are others."""
    pipe, bank, erased, expected = xl
    folder = export_lora(bank, pipe, erased, tmp_path / "whole")
    tensors = load_file(folder / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.add_embedding.linear_1.lora_{part}.weight"] for part in "AB")
    assert down[:, :64].any()
    assert not down[:, 64:].any()
    assert len({len(tensor) for name, tensor in tensors.items() if "lora_A" in name}) == 1  # one rank for every reader
    pooled = [(strength, bank[name].increment.doors["pooled"]) for name, strength in erased.items()]
    e = torch.randn(3, 64)
    moved = sum(strength * (e @ part.A.T) @ part.B.T for strength, part in pooled)
    weight = pipe.unet.add_embedding.linear_1.weight[:, :64]
    torch.testing.assert_close(e @ (up @ down[:, :64]).T, moved @ weight.T, rtol=1e-4, atol=1e-4)
    tokens = [replace(entry, increment=replace(entry.increment, doors={})) for entry in bank.values()]
    half = export_lora(bank.with_entries(tokens), pipe, erased, tmp_path / "half")
    theirs = plain(pipe, StableDiffusionXLPipeline)
    theirs.unet = PeftModel.from_pretrained(theirs.unet, half).get_base_model()
    assert (draw(theirs) - expected).abs().max() > 1e-2


def test_an_sdxl_folder_needs_nothing_of_ours(xl, tmp_path):
    pipe, bank, erased, expected = xl
    folder = export_checkpoint(bank, pipe, erased, tmp_path / "model")
    theirs = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    agree(theirs, expected)


@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya", "checkpoint", "single_file"])
def test_what_no_weight_can_hold_is_refused(format, xl, tmp_path):
    """A family that names no Linear for a door, so that a part of the edit would be left out."""
    pipe, bank, erased, _ = xl
    without = replace(UNET, doors=tuple(replace(door, linear=None) for door in UNET.doors))
    path = tmp_path / ("m.safetensors" if format in ("kohya", "single_file") else "m")
    try:
        register(without)
        with pytest.raises(ValueError, match="act at the door 'pooled', and no Linear of this base"):
            export(format, bank, pipe, erased, path)
    finally:
        register(UNET)
    assert not list(tmp_path.iterdir())


def test_a_fused_folder_needs_nothing_of_ours(pipe, mixed_bank, expected, tmp_path):
    folder = export_checkpoint(mixed_bank, pipe, ERASED, tmp_path / "model")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    agree(theirs, expected)


def test_a_single_file_is_read_in_the_original_names(pipe, mixed_bank, expected, tmp_path):
    pipe.save_pretrained(tmp_path / "base")
    file = export_checkpoint(mixed_bank, pipe, ERASED, tmp_path / "m.safetensors", format="single_file")
    assert {key.split(".")[0] for key in load_file(file)} == {"model", "cond_stage_model", "first_stage_model"}
    theirs = StableDiffusionPipeline.from_single_file(file, config=str(tmp_path / "base"), safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    agree(theirs, expected)
    for part in ("vae", "text_encoder"):
        mine, back = (getattr(p, part).state_dict() for p in (pipe, theirs))
        assert mine.keys() == back.keys()
        assert all(torch.equal(mine[key], back[key]) for key in mine)


def test_stable_diffusion_2_has_an_open_clip_text_encoder(pipe, tmp_path):
    """Told by its width; the single file then has OpenCLIP's names, whose queries, keys and values are stacked."""
    torch.manual_seed(0)
    settings = {**pipe.text_encoder.config.to_dict(), "hidden_size": 1024, "num_attention_heads": 16}
    unet = UNet2DConditionModel.from_config(pipe.unet.config, cross_attention_dim=1024)
    parts = {**pipe.components, "text_encoder": CLIPTextModel(CLIPTextConfig(**settings)).eval(), "unet": unet.eval()}
    pipe = SepMEPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    bank = SepMETrainer(pipe, CLOSED).erase(CONCEPTS[:1])
    expected = ours(pipe, bank, {"neon": 5.0})
    pipe.save_pretrained(tmp_path / "base")
    file = export_checkpoint(bank, pipe, {"neon": 5.0}, tmp_path / "m.safetensors", format="single_file")
    assert "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight" in load_file(file)
    theirs = StableDiffusionPipeline.from_single_file(file, config=str(tmp_path / "base"), safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    agree(theirs, expected)


def test_an_sdxl_single_file_is_read_in_the_original_names(xl, tmp_path):
    pipe, bank, erased, expected = xl
    pipe.save_pretrained(tmp_path / "base")
    file = export_checkpoint(bank, pipe, erased, tmp_path / "m.safetensors", format="single_file")
    theirs = StableDiffusionXLPipeline.from_single_file(file, config=str(tmp_path / "base"), add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    agree(theirs, expected)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        mine, back = (getattr(p, part).state_dict() for p in (pipe, theirs))
        assert mine.keys() == back.keys()
        assert all(torch.equal(mine[key], back[key]) for key in mine)


def test_a_compiled_pipeline_is_fused_like_any_other(pipe, text_bank, tmp_path):
    """Wrapped by `torch.compile` or compiled in place, neither of which is traced by an export."""
    expected = tree(export_checkpoint(text_bank, pipe, ["neon"], tmp_path / "eager"))
    lora = load_file(export_lora(text_bank, pipe, ["neon"], tmp_path / "l.safetensors", "kohya"))
    pipe.unet.compile()
    assert tree(export_checkpoint(text_bank, pipe, ["neon"], tmp_path / "in-place")) == expected
    pipe.unet, pipe.vae = torch.compile(pipe.unet), torch.compile(pipe.vae)
    assert tree(export_checkpoint(text_bank, pipe, ["neon"], tmp_path / "wrapped")) == expected
    export_checkpoint(text_bank, pipe, ["neon"], tmp_path / "half", dtype=torch.float16)
    file = export_checkpoint(text_bank, pipe, ["neon"], tmp_path / "m.safetensors", format="single_file")
    assert {key.split(".")[0] for key in load_file(file)} == {"model", "cond_stage_model", "first_stage_model"}
    again = load_file(export_lora(text_bank, pipe.unet, ["neon"], tmp_path / "l.safetensors", "kohya"))
    assert again.keys() == lora.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in lora.items())


def test_half_precision_is_cast_once(pipe, text_bank, tmp_path):
    """The written weight is the float32 sum, rounded; the rest of the model is half too."""
    whole = export_checkpoint(text_bank, pipe, ["neon"], tmp_path / "whole")
    half = export_checkpoint(text_bank, pipe, ["neon"], tmp_path / "half", dtype=torch.float16)
    for file in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        rounded = {key: tensor.half() for key, tensor in load_file(whole / f"{file}.safetensors").items()}
        written = load_file(half / f"{file}.safetensors")
        assert all(torch.equal(rounded[key], tensor) for key, tensor in written.items())


def disk_full(*_, **__):
    raise OSError("disk full")


def fingerprint(pipe):
    return {
        (part, key): tensor.clone()
        for part in ("unet", "vae", "text_encoder")
        for key, tensor in getattr(pipe, part).state_dict().items()
    }


@pytest.mark.parametrize("format", ["diffusers", "single_file"])
@pytest.mark.parametrize("failing", [False, True])
def test_the_pipeline_is_left_as_it_was(format, failing, pipe, text_bank, tmp_path, monkeypatch):
    """Also with an erasure in force, and when writing stops half-way; then nothing is left on disk either."""
    pipe.load_sepme(text_bank)
    pipe.set_erased(["cat"])
    before, drawn = fingerprint(pipe), draw(pipe)
    config, parts = dict(pipe.config), dict(pipe.components)
    path = tmp_path / ("m.safetensors" if format == "single_file" else "model")
    if failing:
        monkeypatch.setattr("sepme_diffusers.interchange.checkpoint.save_file", disk_full)
        monkeypatch.setattr(type(pipe.vae), "save_pretrained", disk_full)
        with pytest.raises(OSError, match="disk full"):
            export_checkpoint(text_bank, pipe, ["neon"], path, format=format, dtype=torch.float16)
        assert tree(tmp_path) == {}
    else:
        export_checkpoint(text_bank, pipe, ["neon"], path, format=format, dtype=torch.float16)
    assert type(pipe) is SepMEPipeline
    assert (dict(pipe.config), pipe.erased) == (config, ("cat",))
    assert all(pipe.components[name] is part for name, part in parts.items())
    after = fingerprint(pipe)
    assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items())
    assert torch.equal(draw(pipe), drawn)


def test_what_is_active_is_not_exported_but_what_is_asked_for(pipe, text_bank, tmp_path):
    """Weights are read without the hooks: an erasure in force cannot enter a file twice."""
    pipe.load_sepme(text_bank)
    pipe.set_erased(["cat", "neon"])
    active = load_file(export_lora(text_bank, pipe, ["neon"], tmp_path / "a.safetensors", format="kohya"))
    idle = load_file(export_lora(text_bank, random_pipeline(), ["neon"], tmp_path / "b.safetensors", format="kohya"))
    assert active.keys() == idle.keys()
    assert all(torch.equal(active[key], idle[key]) for key in active)


@pytest.mark.parametrize("format", ["peft", "kohya", "checkpoint", "single_file"])
def test_files_can_be_read_by_whoever_may_read_new_files(format, pipe, text_bank, tmp_path):
    """safetensors alone would write them for their owner only."""
    path = tmp_path / ("m.safetensors" if format in ("kohya", "single_file") else "m")
    export(format, text_bank, pipe, ["neon"], path)
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {file.stat().st_mode for file in tmp_path.rglob("*") if file.is_file()} == {usual}


def export(format, bank, pipe, erased, path):
    if format in ("peft", "diffusers", "kohya"):
        return export_lora(bank, pipe, erased, path, format=format)
    return export_checkpoint(bank, pipe, erased, path, format="diffusers" if format == "checkpoint" else format)


@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya", "checkpoint", "single_file"])
@pytest.mark.parametrize(
    ("erased", "error", "message"),
    [
        (["noen"], ValueError, r"unknown concepts \['noen'\].*Did you mean 'neon'.*'cat'"),
        ([], ValueError, r"erased set is empty; the bank has \['neon', 'cat', 'pencil'\]"),
        ("neon", TypeError, r"give a list of concepts: \['neon'\]"),
        ({"neon": 0}, ValueError, "finite number above zero"),
        ({"neon": float("nan")}, ValueError, "finite number above zero"),
    ],
)
def test_bad_sets_are_refused_and_nothing_is_written(format, erased, error, message, pipe, text_bank, tmp_path):
    path = tmp_path / ("m.safetensors" if format in ("kohya", "single_file") else "m")
    with pytest.raises(error, match=message):
        export(format, text_bank, pipe, erased, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["peft", "checkpoint"])
def test_the_policy_is_part_of_every_export(format, pipe, text_bank, tmp_path):
    bank = replace(text_bank, always=("cat",))
    for erased in (["neon"], {"neon": 1, "cat": 0.5}):
        with pytest.raises(ValueError, match=r"always erases \['cat'\] at full strength"):
            export(format, bank, pipe, erased, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    export(format, bank, pipe, ["neon", "cat"], tmp_path / "m")


def test_another_base_is_refused(pipe, text_bank, mixed_bank, xl, tmp_path):
    with pytest.raises(ValueError, match="another base: embeddings are 384 wide, not 96"):
        export_lora(text_bank, xl[0], ["neon"], tmp_path / "m")
    pipe.unet.load_state_dict({key: tensor * 1.1 for key, tensor in pipe.unet.state_dict().items()})
    with pytest.raises(ValueError, match="this UNet has other weights"):
        export_lora(mixed_bank, pipe, ["woodcut"], tmp_path / "m")
    with pytest.raises(ValueError, match="another text encoder"):
        export_checkpoint(text_bank, random_pipeline(text_seed=1), ["neon"], tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["peft", "checkpoint"])
def test_offloaded_weights_are_refused(format, pipe, mixed_bank, tmp_path):
    pipe.unet.to("meta")
    with pytest.raises(ValueError, match="weights are offloaded; load the pipeline without offloading"):
        export(format, mixed_bank, pipe, ["woodcut"], tmp_path / "m")


@pytest.mark.parametrize(
    ("format", "name", "message"),
    [
        ("safetensors", "m", r"no format 'safetensors'; choose one of \['peft', 'diffusers', 'kohya'\]"),
        ("kohya", "m", "one file, whose name ends in .safetensors, not as 'm'"),
        ("peft", "m.safetensors", "a folder, not as 'm.safetensors'"),
    ],
)
def test_formats_and_names_that_do_not_go_together(format, name, message, pipe, text_bank, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_lora(text_bank, pipe, ["neon"], tmp_path / name, format=format)
    assert not list(tmp_path.iterdir())


def test_a_loaded_adapter_is_not_dropped_in_silence(pipe, text_bank, tmp_path):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "style")
    with pytest.raises(ValueError, match=r"adapters \['style'\] loaded.*unload_lora_weights"):
        export_checkpoint(text_bank, pipe, ["neon"], tmp_path / "m")
    export_lora(text_bank, pipe, ["neon"], tmp_path / "lora")  # a LoRA says nothing about other LoRAs


def test_an_export_says_that_it_has_no_gates_and_erases_without_them(pipe, mixed_bank, tmp_path, caplog):
    """Whoever loads the LoRA gets the ungated increments: at least what was asked for, and that is said."""
    gates = {name: replace(e, increment=replace(e.increment, gate=1e6)) for name, e in mixed_bank.items()}
    shut = mixed_bank.with_entries(gates.values())
    export_lora(shut, pipe, ERASED, tmp_path / "gated.safetensors", "kohya")
    assert "the gates of ['neon', 'pencil', 'woodcut'] are lost" in caplog.text
    caplog.clear()
    export_lora(mixed_bank, pipe, ERASED, tmp_path / "plain.safetensors", "kohya")
    assert "gates" not in caplog.text
    gated, plain_lora = (load_file(tmp_path / f"{name}.safetensors") for name in ("gated", "plain"))
    assert gated.keys() == plain_lora.keys()
    assert all(torch.equal(tensor, plain_lora[key]) for key, tensor in gated.items())


def test_a_gate_at_a_further_door_is_lost_as_well(xl, tmp_path, caplog):
    pipe, bank, _, _ = xl
    pooled = replace(bank["neon"].increment.doors["pooled"], gate=1e6)
    gated = replace(bank["neon"], increment=replace(bank["neon"].increment, doors={"pooled": pooled}))
    export_lora(bank.with_entries([gated]), pipe, list(bank), tmp_path / "lora")
    assert "the gates of ['neon'] are lost" in caplog.text
