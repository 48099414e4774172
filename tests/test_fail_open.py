"""What other code does to a pipeline, one row a way: the erasure still shows in the picture, or an exception says why.

On the built-in model and by its judge. Each row is done before the bank is loaded and after two styles are erased, one
by a text-side increment and one by a per-module increment. The same picture drawn with nothing erased must show the
styles, or the row would prove nothing.
"""

import copy
import pickle
import threading
from dataclasses import replace

import accelerate
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPAGPipeline,
    UNet2DConditionModel,
)
from diffusers.models import attention_processor as processors
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from transformers import CLIPTextModel

from sepme_diffusers import ErasureNotInForce, SepMEPipeline, attach, pocket
from sepme_diffusers.doors.linears import cross_attentions, linear_of, projection_weights, text_projections
from sepme_diffusers.text.encoding import encode

TEXT_SIDE, PER_MODULE = "woodcut", "neon"
STYLES = (TEXT_SIDE, PER_MODULE)
PROMPTS = ["a fox in the style of woodcut", "a neon owl"]
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def bank():
    unet = UNet2DConditionModel.from_pretrained(pocket.path(), subfolder="unet")
    styles = pocket.bank("styles").subset(STYLES)
    entry = styles[PER_MODULE]
    return styles.with_entries([replace(entry, increment=entry.increment.expand(projection_weights(unet)))])


@pytest.fixture
def pipe():
    loaded = SepMEPipeline.from_pretrained(pocket.path())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe, **kwargs):
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    settings = {"prompt": PROMPTS, "num_inference_steps": 12, "guidance_scale": 4.0, "generator": seeds}
    return pipe(**settings | kwargs).images


def share(pictures):
    """How much of its prompt's style the judge sees in each picture."""
    found, _ = pocket.classify(pictures)
    return [float(row[pocket.style_classes.index(style)]) for row, style in zip(found, STYLES, strict=True)]


def erased_in(pictures):
    return max(share(pictures)) < 0.2


def shown_in(pictures):
    return min(share(pictures)) > 0.5


def lora(pipe, name="other", seed=0, scale=0.02):
    """A LoRA of someone else's, over every attention projection, loaded through the pipeline's loader."""
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=PROJECTIONS))
    torch.manual_seed(seed)
    state = {f"unet.{key}": scale * torch.randn_like(value) for key, value in get_peft_model_state_dict(unet).items()}
    pipe.load_lora_weights(state, adapter_name=name)


def lora_then(*calls):
    def act(pipe):
        lora(pipe)
        for call in calls:
            call(pipe)

    return act


def hotswap(pipe):
    pipe.unet.enable_lora_hotswap(target_rank=4)
    lora(pipe)
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=PROJECTIONS))
    torch.manual_seed(5)
    state = {f"unet.{k}": 0.02 * torch.randn_like(v) for k, v in get_peft_model_state_dict(unet).items()}
    pipe.load_lora_weights(state, adapter_name="other", hotswap=True)


def set_processor(make):
    return lambda pipe: pipe.unet.set_attn_processor(make())


def custom_diffusion(pipe):
    made = dict(pipe.unet.attn_processors)
    for name, attention in cross_attentions(pipe.unet).items():
        own = processors.CustomDiffusionAttnProcessor2_0(
            train_q_out=False, hidden_size=attention.to_q.in_features, cross_attention_dim=attention.to_k.in_features
        )
        own.to_k_custom_diffusion.weight.data.copy_(attention.to_k.weight.data)
        own.to_v_custom_diffusion.weight.data.copy_(attention.to_v.weight.data)
        made[f"{name}.processor"] = own
    pipe.unet.set_attn_processor(made)


def merge_tokens(pipe):
    pytest.importorskip("tomesd").apply_patch(pipe, ratio=0.3)


def load_ip_adapter(pipe):
    """An IP-Adapter with random weights, through the loader that `load_ip_adapter` ends in."""
    width, state, torch_state = pipe.unet.config.cross_attention_dim, {}, torch.manual_seed(0)
    for index, attention in enumerate(cross_attentions(pipe.unet).values()):
        for key in ("to_k_ip", "to_v_ip"):
            d_out = attention.to_k.out_features
            state[f"{2 * index + 1}.{key}.weight"] = 0.02 * torch.randn(d_out, width, generator=torch_state)
    projection = {
        "proj.weight": 0.02 * torch.randn(4 * width, 32), "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": state}])


def ip_adapter_there_and_away(pipe):
    load_ip_adapter(pipe)
    pipe.unload_ip_adapter()


def textual_inversion(pipe):
    width = pipe.unet.config.cross_attention_dim
    pipe.load_textual_inversion({"<mine>": torch.randn(width)}, token="<mine>")


def group_offload(pipe, level="leaf_level"):
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=level, **blocks)


def offload_load_then_lora(pipe):
    group_offload(pipe)
    lora(pipe)
    pipe.unload_lora_weights()


def other_weights(pipe):
    torch.manual_seed(0)
    pipe.unet.load_state_dict(UNet2DConditionModel.from_config(pipe.unet.config).state_dict())


def fine_tuned_weights(pipe):
    pipe.unet.load_state_dict(UNet2DConditionModel.from_pretrained(pocket.path("variant")).state_dict())


def other_text_encoder(pipe):
    torch.manual_seed(0)
    pipe.text_encoder = CLIPTextModel(pipe.text_encoder.config).eval()


def other_text_weights(pipe):
    torch.manual_seed(0)
    pipe.text_encoder.load_state_dict(CLIPTextModel(pipe.text_encoder.config).state_dict())


def swap(make):
    def act(pipe):
        pipe.unet = make(pipe.unet)

    return act


def quantise_torchao(pipe):
    quantization = pytest.importorskip("torchao.quantization")
    chosen = {id(linear_of(module)) for module in text_projections(pipe.unet).values()}
    quantization.quantize_(
        pipe.unet, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, _: id(module) in chosen
    )


def quantise_quanto(pipe):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(pipe.unet, weights=quanto.qint8)
    quanto.freeze(pipe.unet)


def quantise_bitsandbytes(kind):
    def act(pipe):
        nn = pytest.importorskip("bitsandbytes").nn
        for name, module in text_projections(pipe.unet).items():
            shape = (module.in_features, module.out_features)
            if kind == "Linear8bitLt":
                packed = nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            else:
                packed = nn.Linear4bit(*shape, bias=False, compute_dtype=torch.float32)
            packed.load_state_dict(module.state_dict())
            pipe.unet.set_submodule(name, packed.to("cpu"))

    return act


def clear_hooks(pipe):
    for module in pipe.unet.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def cast(dtype):
    return lambda pipe: pipe.to(dtype)


HOLDS = "holds"
BYPASSED = (ErasureNotInForce, "no longer pass through|bypassed")
REPLACED = (ErasureNotInForce, "UNet has been replaced")

# way: (what is done, the outcome where it is done before load_sepme, the outcome where it is done after set_erased)
ROWS = {
    "nothing": (lambda pipe: None, HOLDS, HOLDS),
    "LoRA loaded": (lora, HOLDS, HOLDS),
    "LoRA activated": (lora_then(lambda p: p.set_adapters("other")), HOLDS, HOLDS),
    "LoRA at weight 0": (lora_then(lambda p: p.set_adapters("other", 0.0)), HOLDS, HOLDS),
    "LoRA disabled": (lora_then(lambda p: p.disable_lora()), HOLDS, HOLDS),
    "LoRA disabled and enabled": (lora_then(lambda p: p.disable_lora(), lambda p: p.enable_lora()), HOLDS, HOLDS),
    "LoRA fused": (lora_then(lambda p: p.fuse_lora()), HOLDS, HOLDS),
    "LoRA fused and unfused": (lora_then(lambda p: p.fuse_lora(), lambda p: p.unfuse_lora()), HOLDS, HOLDS),
    "LoRA fused and unloaded": (lora_then(lambda p: p.fuse_lora(), lambda p: p.unload_lora_weights()), HOLDS, HOLDS),
    "LoRA unloaded": (lora_then(lambda p: p.unload_lora_weights()), HOLDS, HOLDS),
    "LoRA deleted": (lora_then(lambda p: p.delete_adapters("other")), HOLDS, HOLDS),
    "two LoRAs, one active": (lora_then(lambda p: lora(p, "b", 1), lambda p: p.set_adapters(["b"])), HOLDS, HOLDS),
    "LoRA hotswapped": (hotswap, HOLDS, HOLDS),
    "AttnProcessor": (set_processor(processors.AttnProcessor), HOLDS, HOLDS),
    "AttnProcessor2_0": (set_processor(processors.AttnProcessor2_0), HOLDS, HOLDS),
    "SlicedAttnProcessor": (set_processor(lambda: processors.SlicedAttnProcessor(1)), HOLDS, HOLDS),
    "default processor": (lambda p: p.unet.set_default_attn_processor(), HOLDS, HOLDS),
    "CustomDiffusionAttnProcessor2_0": (custom_diffusion, BYPASSED, BYPASSED),
    "fuse_qkv_projections": (lambda p: p.unet.fuse_qkv_projections(), BYPASSED, BYPASSED),
    "fuse and unfuse_qkv_projections": (
        lambda p: (p.unet.fuse_qkv_projections(), p.unet.unfuse_qkv_projections()), HOLDS, HOLDS),
    "attention slicing": (lambda p: p.enable_attention_slicing("max"), HOLDS, HOLDS),
    "attention backend": (lambda p: p.unet.set_attention_backend("native"), HOLDS, HOLDS),
    "FreeU": (lambda p: p.enable_freeu(s1=0.95, s2=0.95, b1=1.02, b2=1.02), HOLDS, HOLDS),
    "token merging": (merge_tokens, HOLDS, HOLDS),
    "IP-Adapter there and away": (ip_adapter_there_and_away, HOLDS, HOLDS),
    "textual inversion": (textual_inversion, HOLDS, HOLDS),
    "to bfloat16": (cast(torch.bfloat16), HOLDS, HOLDS),
    "to float64": (cast(torch.float64), HOLDS, HOLDS),
    "layerwise casting": (
        lambda p: p.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32),
        HOLDS, HOLDS),
    "group offload by leaves": (group_offload, HOLDS, HOLDS),
    "group offload by blocks": (lambda p: group_offload(p, "block_level"), HOLDS, HOLDS),
    "group offload, then a LoRA there and away": (offload_load_then_lora, HOLDS, HOLDS),
    "sequential offload": (lambda p: accelerate.cpu_offload(p.unet, torch.device("cpu")), HOLDS, HOLDS),
    "model offload": (
        lambda p: accelerate.cpu_offload_with_hook(p.unet, torch.device("cpu")), HOLDS, HOLDS),
    "UNet copied": (swap(copy.deepcopy), HOLDS, REPLACED),
    "UNet of the same shape": (
        swap(lambda unet: UNet2DConditionModel.from_pretrained(pocket.path("variant"))), HOLDS, REPLACED),
    "fine-tuned weights": (fine_tuned_weights, HOLDS, HOLDS),
    "other weights": (
        other_weights, (ValueError, "this UNet has other weights"), (ErasureNotInForce, "no longer those")),
    "other text encoder": (
        other_text_encoder, (ValueError, "another text encoder"), (ErasureNotInForce, "text encoder has changed")),
    "other weights in the text encoder": (
        other_text_weights, (ValueError, "another text encoder"), (ErasureNotInForce, "text encoder has changed")),
    "VAE tiling and slicing": (lambda p: (p.vae.enable_tiling(), p.vae.enable_slicing()), HOLDS, HOLDS),
    "channels last": (lambda p: p.unet.to(memory_format=torch.channels_last), HOLDS, HOLDS),
    "torchao int8": (quantise_torchao, HOLDS, HOLDS),
    "quanto int8": (quantise_quanto, HOLDS, BYPASSED),
    "bitsandbytes int8": (quantise_bitsandbytes("Linear8bitLt"), HOLDS, BYPASSED),
    "bitsandbytes 4 bit": (quantise_bitsandbytes("Linear4bit"), HOLDS, BYPASSED),
    "all hooks cleared": (clear_hooks, HOLDS, BYPASSED),
    "gradient checkpointing": (lambda p: p.unet.enable_gradient_checkpointing(), HOLDS, HOLDS),
}  # fmt: skip


def expect(outcome, act):
    if outcome != HOLDS:
        with pytest.raises(outcome[0], match=outcome[1]):
            act()
    return outcome == HOLDS


@pytest.mark.parametrize("way", ROWS)
def test_done_before_loading(way, pipe, bank):
    disturb, outcome, _ = ROWS[way]
    disturb(pipe)

    def go():
        pipe.load_sepme(bank)
        pipe.set_erased(STYLES)
        assert erased_in(draw(pipe))

    if expect(outcome, go):
        pipe.restore_all()
        assert shown_in(draw(pipe))


@pytest.mark.parametrize("way", ROWS)
def test_done_while_erased(way, pipe, bank):
    disturb, _, outcome = ROWS[way]
    pipe.load_sepme(bank)
    pipe.set_erased(STYLES)
    disturb(pipe)
    if expect(outcome, lambda: draw(pipe)):
        assert erased_in(draw(pipe))
        assert shown_in(draw(pipe, erased=[]))


@pytest.fixture
def erased(pipe, bank):
    pipe.load_sepme(bank)
    pipe.set_erased(STYLES)
    return pipe


def test_attention_kwargs_do_not_scale_an_erasure_away(erased):
    lora(erased)
    assert erased_in(draw(erased, cross_attention_kwargs={"scale": 0.0}))


def test_an_ip_adapter_in_use_leaves_the_text_erased(erased):
    load_ip_adapter(erased)
    erased.set_ip_adapter_scale(0.1)
    embeds = [torch.randn(4, 1, 32, generator=torch.manual_seed(0))]
    assert erased_in(draw(erased, ip_adapter_image_embeds=embeds))
    assert shown_in(draw(erased, ip_adapter_image_embeds=embeds, erased=[]))


def controlnet_for(pipe):
    """A ControlNet for a VAE that reduces by four."""
    return ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 64))


GREY, ALL = Image.new("RGB", (64, 64), "grey"), Image.new("L", (64, 64), 255)


@pytest.mark.parametrize(
    ("convert", "kwargs"),
    [
        (AutoPipelineForImage2Image.from_pipe, {"image": [GREY] * 2, "strength": 1.0}),
        (AutoPipelineForInpainting.from_pipe, {"image": [GREY] * 2, "mask_image": [ALL] * 2, "strength": 1.0}),
        (StableDiffusionPAGPipeline.from_pipe, {"pag_scale": 0.5}),
        (
            lambda pipe: StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=controlnet_for(pipe)),
            {"image": [GREY] * 2},
        ),
    ],
    ids=["image to image", "inpainting", "PAG", "ControlNet"],
)
def test_a_pipeline_made_by_from_pipe_erases_too(erased, convert, kwargs):
    """The plain class shares what is erased; `attach` gives it the methods."""
    other = convert(erased)
    other.set_progress_bar_config(disable=True)
    assert erased_in(draw(other, **kwargs))
    attach(other)
    assert other.erased == erased.erased
    assert erased_in(draw(other, **kwargs))
    assert shown_in(draw(other, erased=[], **kwargs))
    sets = [[TEXT_SIDE], []]
    some = share(draw(other, erased=sets, **kwargs))
    assert some[0] < 0.2
    assert some[1] > 0.5


def test_a_controlnet_reads_the_edited_text_as_well(erased):
    """It has cross-attention of its own: a text-side erasure must not come back through it."""
    net = controlnet_for(erased)
    other = attach(StableDiffusionControlNetPipeline.from_pipe(erased, controlnet=net))
    other.set_progress_bar_config(disable=True)
    seen = []
    first = next(iter(text_projections(net).values()))
    first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().clone()))
    draw(other, image=[GREY] * 2, num_inference_steps=1, erased=[])
    draw(other, image=[GREY] * 2, num_inference_steps=1, erased=[TEXT_SIDE])
    assert not torch.equal(seen[0], seen[1])


def test_other_components_do_not_matter(erased):
    erased.scheduler = DDIMScheduler.from_config(erased.scheduler.config, timestep_spacing="trailing")
    assert erased_in(draw(erased))


def test_saved_while_erased_it_loads_as_the_plain_model(erased, bank, tmp_path):
    """Nothing of an erasure is written into a checkpoint; the bank, loaded again, erases again."""
    erased.save_pretrained(tmp_path)
    plain = SepMEPipeline.from_pretrained(tmp_path, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    assert shown_in(draw(plain))
    plain.load_sepme(bank)
    plain.set_erased(STYLES)
    assert erased_in(draw(plain))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copied_pipeline_erases_by_itself(erased, duplicate):
    twin = duplicate(erased)
    erased.restore_all()
    assert twin.erased == tuple(STYLES)
    assert erased_in(draw(twin))
    assert shown_in(draw(erased))


def test_a_callback_that_changes_the_prompt_does_not_escape(erased):
    fresh = encode(erased, ["", "", *PROMPTS])

    def change(pipe, step, timestep, tensors):
        return {"prompt_embeds": fresh.clone()} if step == 2 else tensors

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert erased_in(draw(erased, **options))
    assert shown_in(draw(erased, erased=[], **options))


def test_an_erasure_asked_for_half_way_acts_from_there_on(pipe, bank):
    pipe.load_sepme(bank)

    def erase(pipe, step, timestep, tensors):
        if step == 0:
            pipe.set_erased(STYLES)
        return tensors

    assert erased_in(draw(pipe, callback_on_step_end=erase))


def test_a_prompt_longer_than_the_guards_is_erased(erased):
    """Prompts joined beyond the text encoder's length, as weighting tools do."""
    long = torch.cat([encode(erased, ["a picture"] * 2), encode(erased, PROMPTS)], dim=1)
    blank = encode(erased, ["", ""]).repeat(1, 2, 1)
    embeds = {"prompt": None, "prompt_embeds": long, "negative_prompt_embeds": blank}
    assert erased_in(draw(erased, **embeds))
    assert shown_in(draw(erased, erased=[], **embeds))


def test_threads_with_different_sets_do_not_meet(pipe, bank):
    """Two requests at once on one UNet, each with its own scheduler, as a server does."""
    pipe.load_sepme(bank)
    expected = {sets: draw(pipe, erased=list(sets), output_type="np") for sets in ((), STYLES)}
    found, start = {}, threading.Barrier(2)

    def work(sets):
        own = SepMEPipeline(**pipe.components | {"scheduler": DDIMScheduler.from_config(pipe.scheduler.config)},
                            requires_safety_checker=False)  # fmt: skip
        own.set_progress_bar_config(disable=True)
        start.wait()
        found[sets] = [draw(own, erased=list(sets), output_type="np") for _ in range(3)]

    threads = [threading.Thread(target=work, args=(sets,)) for sets in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sets, pictures in found.items():
        assert all((picture == expected[sets]).all() for picture in pictures)
    assert pipe.erased == ()


@pytest.fixture
def graphs():
    """Counts the graphs that are compiled; without a back end, so that it is quick."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    yield counter
    torch.compiler.reset()


def compile_whole(pipe, graphs):
    pipe.unet = torch.compile(pipe.unet, backend=graphs)


def compile_in_place(pipe, graphs):
    pipe.unet.compile(backend=graphs)


def compile_blocks(pipe, graphs):
    pipe.unet.compile_repeated_blocks(backend=graphs)


@pytest.mark.parametrize(
    ("compiling", "when"),
    [
        *((compile_whole, when) for when in ("first", "after loading", "after erasing", "after a compiled call")),
        *((way, "after a compiled call") for way in (compile_in_place, compile_blocks)),
    ],
)
def test_compiled_before_or_after(pipe, bank, graphs, compiling, when):
    """A graph traced without the hooks must not be used again once they are there."""
    if when in ("first", "after a compiled call"):
        compiling(pipe, graphs)
    if when == "after a compiled call":
        assert shown_in(draw(pipe))
    pipe.load_sepme(bank)
    if when == "after loading":
        compiling(pipe, graphs)
    pipe.set_erased(STYLES)
    if when == "after erasing":
        assert erased_in(draw(pipe))
        compiling(pipe, graphs)
    assert erased_in(draw(pipe))
    pipe.restore(TEXT_SIDE)
    some = share(draw(pipe))
    assert some[0] > 0.5
    assert some[1] < 0.2
    assert erased_in(draw(pipe, erased=STYLES))
    pipe.unload_sepme()
    assert shown_in(draw(pipe))


def test_changing_the_set_compiles_nothing_anew(pipe, graphs):
    """Twenty sets of two banks of 110 concepts, empty and large ones: the graph of the first call serves them all."""
    for name in ("styles", "objects"):
        pipe.load_sepme(pocket.bank(name), name=name)
    compile_whole(pipe, graphs)
    draw(pipe, num_inference_steps=1)
    compiled = graphs.frame_count
    assert compiled > 0
    for size in range(20):
        pipe.set_erased(pipe.erasable[size : 2 * size])
        draw(pipe, num_inference_steps=1)
    assert graphs.frame_count == compiled


def test_gates_work_in_the_graph_that_was_compiled_without_them(pipe, bank, graphs):
    """One graph for every set; what a gate lets through and what it shuts out is the same as without a compiler."""
    entries = [replace(e, increment=e.increment.gated(encode(pipe, e.concept.prompts), 0.5)) for e in bank.values()]
    pipe.load_sepme(bank.with_entries(entries))
    sets = [(), STYLES, (TEXT_SIDE,), (PER_MODULE,)]
    expected = [draw(pipe, erased=list(names), output_type="latent") for names in sets]
    compile_whole(pipe, graphs)
    for names, latents in zip(sets, expected, strict=True):
        torch.testing.assert_close(draw(pipe, erased=list(names), output_type="latent"), latents, atol=1e-4, rtol=1e-4)
    assert graphs.frame_count == 1
    assert erased_in(draw(pipe, erased=list(STYLES)))
    # The other prompt of the batch is left to the bit.
    assert torch.equal(expected[2][1], expected[0][1])
    assert torch.equal(expected[3][0], expected[0][0])


def test_an_exported_unet_keeps_the_erasure_it_was_exported_with(erased):
    latents, step, text = torch.randn(2, 4, 16, 16), torch.tensor(10), encode(erased, PROMPTS)
    exported = torch.export.export(erased.unet.eval(), (latents, step, text), strict=False).module()
    with torch.no_grad():
        expected = erased.unet(latents, step, text).sample
        erased.restore_all()
        plain = erased.unet(latents, step, text).sample
        torch.testing.assert_close(exported(latents, step, text).sample, expected)
    assert not torch.allclose(plain, expected, atol=1e-3)
