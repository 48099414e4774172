"""Every spelling of one and the same change is read alike."""

from dataclasses import replace

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sepme_diffusers import SepMETrainer, export_checkpoint, export_lora
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.interchange.merge import merged_changes
from sepme_diffusers.interchange.weight_change import read_change
from small import CLOSED, CONCEPTS, random_xl_pipeline

ERASED = {"woodcut": 1.0, "neon": 2.0}
MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def deltas(pipe, mixed_bank):
    return {name: c @ a for name, (a, c) in merged_changes(mixed_bank, pipe.unet, ERASED).items()}


def matches(change, deltas, atol=1e-6):
    assert change.inside.keys() == deltas.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(change.inside[name], delta.detach(), rtol=0, atol=atol)


@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya"])
def test_lora_files_in_every_spelling(format, pipe, mixed_bank, deltas, tmp_path):
    path = export_lora(
        mixed_bank, pipe, ERASED, tmp_path / ("l.safetensors" if format == "kohya" else "l"), format=format
    )
    change = read_change(path, pipe.unet)
    matches(change, deltas)
    assert (change.kind, change.outside, change.share_inside) == ("lora", {}, 1.0)


def test_the_old_diffusers_spelling(pipe, mixed_bank, deltas, tmp_path):
    folder = export_lora(mixed_bank, pipe, ERASED, tmp_path / "lora", format="diffusers")
    modern = load_file(folder / "pytorch_lora_weights.safetensors")
    for old in (
        convert_state_dict_to_diffusers(modern),
        {k.replace(".to_", ".processor.to_").replace(".lora_A", "_lora.down").replace(".lora_B", "_lora.up"): t
         for k, t in modern.items()},
    ):  # fmt: skip
        matches(read_change(old, pipe.unet), deltas)


def test_sdxl_s_original_names_are_read(tmp_path):
    pipe = random_xl_pipeline()
    weights = projection_weights(pipe.unet)
    bank = SepMETrainer(pipe, replace(CLOSED, rank=3)).erase(CONCEPTS[:1])
    file = export_lora(bank, pipe, ["neon"], tmp_path / "l.safetensors", format="kohya")
    assert any("input_blocks" in key for key in load_file(file))
    matches(read_change(file, pipe.unet), bank["neon"].increment.delta_weights(weights))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_folder_s_own_scale_counts(rslora, pipe, tmp_path):
    """What PEFT itself would add with lora_alpha unlike r, patterns and rsLoRA."""
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["to_k"], use_rslora=rslora, init_lora_weights=False,
        alpha_pattern={MODULE: 3},
    )  # fmt: skip
    before = {name: weight.detach().clone() for name, weight in projection_weights(pipe.unet).items()}
    model = get_peft_model(pipe.unet, config)
    model.save_pretrained(tmp_path)
    change = read_change(tmp_path, pipe.unet)
    model.merge_adapter()
    added = {n: w.detach() - before[n] for n, w in projection_weights(pipe.unet).items() if n.endswith("to_k")}
    matches(change, added)
    assert len(change.outside) == len(added)  # attn1.to_k
    assert 0 < change.share_inside < 1


def test_kohya_alpha_scales(pipe, mixed_bank, deltas, tmp_path):
    tensors = load_file(export_lora(mixed_bank, pipe, ERASED, tmp_path / "l.safetensors", format="kohya"))
    halved = {key: tensor / 2 if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    matches(read_change(halved, pipe.unet), {name: delta / 2 for name, delta in deltas.items()})


def test_edited_weights_in_every_spelling(pipe, mixed_bank, deltas, tmp_path):
    folder = export_checkpoint(mixed_bank, pipe, ERASED, tmp_path / "model")
    file = export_checkpoint(mixed_bank, pipe, ERASED, tmp_path / "model.safetensors", format="single_file")
    whole = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    some = {f"{name}.weight": whole[f"{name}.weight"] for name in deltas}
    for source in (folder, folder / "unet", file, whole, some, {f"unet.{key}": t for key, t in some.items()}):
        change = read_change(source, pipe.unet)
        matches(change, deltas)
        assert (change.kind, change.outside) == ("weights", {})
    assert any(name.startswith("first_stage_model") for name in read_change(file, pipe.unet).unread)
    matches(read_change({f"{n}.weight": d for n, d in deltas.items()}, pipe.unet, difference=True), deltas)


def test_half_precision_files_change_only_what_was_edited(pipe, mixed_bank, tmp_path):
    """A whole UNet in half precision differs from the float32 base everywhere, by rounding; that is no edit."""
    weights = {key: tensor.half() for key, tensor in pipe.unet.state_dict().items()}
    weights[f"{MODULE}.weight"] = weights[f"{MODULE}.weight"] * 2
    weights["conv_in.bias"] = weights["conv_in.bias"] + 1
    change = read_change(weights, pipe.unet)
    assert list(change.inside) == [MODULE]
    assert list(change.outside) == ["conv_in.bias"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"something.else": torch.ones(2)}, r"nothing in it is a LoRA.*something\.else"),
        ({}, "nothing in it is a LoRA"),
        ({f"{MODULE}.weight": torch.ones(3, 3)}, r"another UNet.*\(3, 3\)"),
        (
            {f"unet.{MODULE}.lora_A.weight": torch.ones(2, 5), f"unet.{MODULE}.lora_B.weight": torch.ones(3, 2)},
            r"another UNet.*\(3, 5\)",
        ),
        ({f"unet.{MODULE}.lora_A.weight": torch.ones(2, 5)}, "one factor of two"),
        (
            {
                f"unet.{MODULE}.lora_A.weight": torch.ones(2, 384),
                f"unet.{MODULE}.lora_B.weight": torch.ones(16, 2),
                f"unet.{MODULE}.lora_magnitude_vector": torch.ones(16),
            },
            "not a plain LoRA.*lora_magnitude_vector",
        ),
    ],
)
def test_what_cannot_be_understood_is_refused(tensors, message, pipe):
    with pytest.raises(ValueError, match=message):
        read_change(tensors, pipe.unet)


def test_files_that_are_not_there_or_not_safe(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for .*adapter_model\.safetensors"):
        read_change(tmp_path, pipe.unet)
    (tmp_path / "esd.pt").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"esd\.pt is not a \.safetensors file.*weights_only=True"):
        read_change(tmp_path / "esd.pt", pipe.unet)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="keys are like"):
        read_change(str(tmp_path / "x.safetensors"), pipe.unet)
