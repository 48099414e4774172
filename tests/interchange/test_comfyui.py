"""The node's plain part, with keys and patches as ComfyUI hands them over."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sepme_diffusers import SepMETrainer
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.doors.registry import door_linears
from sepme_diffusers.interchange import original_names
from small import CLOSED, CONCEPTS, draw, random_pipeline, random_xl_pipeline

FOLDER = Path(__file__).parents[2] / "examples" / "comfyui"


@pytest.fixture(scope="module")
def nodes():
    """The folder, imported as ComfyUI does: as a package of some other name, without ComfyUI."""
    spec = importlib.util.spec_from_file_location("custom_node", FOLDER / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    sys.modules["custom_node"] = package
    spec.loader.exec_module(package)
    yield sys.modules["custom_node.nodes"]
    del sys.modules["custom_node"], sys.modules["custom_node.nodes"]


def hand_over(pipe):
    """ComfyUI's {LoRA key: weight key} and {weight key: [weight, patches ...]} for the Linears that read the text."""
    weights = projection_weights(pipe.unet) | dict(door_linears(pipe.unet).values())
    originals = original_names.unet_names(weights, pipe.unet.config.layers_per_block)
    keys = {
        f"lora_unet_{name.replace('.', '_')}": f"diffusion_model.{original}.weight"
        for name, original in originals.items()
    }
    patches = {
        f"diffusion_model.{originals[name]}.weight": [(weight.detach(), lambda tensor: tensor), "a LoRA's patch"]
        for name, weight in weights.items()
    }
    return keys, patches


@pytest.fixture
def handed_over(pipe):
    return hand_over(pipe)


def apply(lora, keys, patches):
    """What ComfyUI does with a LoRA; every weight that reads the text is changed once."""
    modules = sorted({name.split(".")[0] for name in lora})
    assert sorted(keys[key] for key in modules) == sorted({*keys.values()})
    for key, weight_key in ((key, keys[key]) for key in modules):
        up, down, alpha = (lora.pop(f"{key}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        patches[weight_key][0][0].add_(up @ down * (alpha.item() / len(down)))
    assert not lora


def test_the_node_is_found_under_its_name(nodes):
    node = nodes.NODE_CLASS_MAPPINGS["SepMEEraseConcepts"]
    assert set(node.INPUT_TYPES()["required"]) == {"model", "bank", "erased"}
    assert node.RETURN_TYPES == ("MODEL",)
    assert hasattr(node, node.FUNCTION)
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.NODE_CLASS_MAPPINGS.keys()


def test_a_text_box_says_an_erased_set(nodes, text_bank):
    assert nodes.erased_set(text_bank, " neon \n\ncat = 0.5\n") == {"neon": 1.0, "cat": 0.5}
    assert nodes.erased_set(text_bank, " \n") == {}
    assert nodes.erased_set(replace(text_bank, always=("cat",)), "neon") == {"neon": 1.0, "cat": 1.0}
    with pytest.raises(ValueError, match="Did you mean 'neon'"):
        nodes.erased_set(text_bank, "neno")
    with pytest.raises(ValueError, match="'neon = much' is not understood"):
        nodes.erased_set(text_bank, "neon = much")
    with pytest.raises(ValueError, match=r"always erases \['cat'\] at full strength"):
        nodes.erased_set(replace(text_bank, always=("cat",)), "cat = 0.5")


@pytest.mark.parametrize("form", ["text", "mixed"])
def test_the_lora_erases_as_our_pipeline_does(form, nodes, handed_over, pipe, text_bank, mixed_bank):
    bank = text_bank if form == "text" else mixed_bank
    keys, patches = handed_over
    strengths = nodes.erased_set(bank, "\n".join(bank))
    if form == "text":  # made for the text encoders; ComfyUI calls each module by several names
        bank = replace(bank, base=replace(bank.base, projections=None))
        keys |= {f"lora_unet_input_{n}_attn2_to_k": key for n, key in enumerate(keys.values()) if "to_k" in key}
    apply(nodes.erasing_lora(bank, strengths, nodes.base_weights(bank, keys, patches), {}), keys, patches)
    ours = random_pipeline()
    ours.load_sepme(bank)
    ours.set_erased(list(bank))
    torch.testing.assert_close(draw(pipe), draw(ours), rtol=0, atol=1e-5)


def test_the_lora_of_an_sdxl_bank_edits_both_doors(nodes):
    pipe, ours = random_xl_pipeline(), random_xl_pipeline()
    bank = SepMETrainer(ours, replace(CLOSED, rank=3)).erase(CONCEPTS[:2])
    keys, patches = hand_over(pipe)
    weights, linears = nodes.base_weights(bank, keys, patches), nodes.door_linears(bank, keys, patches)
    strengths = {"neon": 20.0, "cat": 10.0}
    apply(nodes.erasing_lora(bank, strengths, weights, linears), keys, patches)
    ours.load_sepme(bank)
    ours.set_erased(strengths)
    torch.testing.assert_close(draw(pipe), draw(ours), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"this model has no \['add_embedding.linear_1'\]"):
        nodes.door_linears(bank, {}, patches)
    with pytest.raises(ValueError, match="act at the door 'pooled', and no Linear of this base"):
        nodes.erasing_lora(bank, strengths, weights, {})


def test_another_architecture_is_refused(nodes, handed_over, text_bank, mixed_bank):
    keys, patches = handed_over
    with pytest.raises(ValueError, match=r"this model has no attn2.to_k"):
        nodes.base_weights(text_bank, {}, patches)
    with pytest.raises(ValueError, match=r"this model has no \['down_blocks"):
        nodes.base_weights(mixed_bank, {}, patches)
    narrow = {key: [(weight[:, :8], None)] for key, ((weight, _), *_) in patches.items()}
    with pytest.raises(ValueError, match="another base: embeddings are 384 wide, not 8"):
        nodes.erasing_lora(text_bank, {"neon": 1.0}, nodes.base_weights(text_bank, keys, narrow), {})


def test_a_bank_saved_again_is_read_again(nodes, text_bank, tmp_path):
    changed = nodes.EraseConcepts.IS_CHANGED
    text_bank.save_pretrained(tmp_path / "bank")
    first = changed(None, str(tmp_path / "bank"), "neon")
    assert changed(None, str(tmp_path / "bank"), "neon") == first
    text_bank.save_pretrained(tmp_path / "bank")
    assert changed(None, str(tmp_path / "bank"), "neon") > first
    assert changed(None, "me/bank", "neon") == 0
