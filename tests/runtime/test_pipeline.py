from dataclasses import replace

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sepme_diffusers import (
    BankError,
    ConceptBank,
    ErasureNotInForce,
    Increment,
    PolicyError,
    SepMEConfig,
    SepMEPipeline,
    SepMETrainer,
    attach,
    pocket,
)
from sepme_diffusers.algebra.subspace import leakage
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.text.encoding import encode, rows
from small import CLOSED, CONCEPTS, latents, random_pipeline, random_xl_pipeline


@pytest.fixture
def loaded(pipe, mixed_bank):
    pipe.load_sepme(mixed_bank)
    return pipe


def test_loading_erases_nothing(mixed_bank):
    plain, pipe = random_pipeline(), random_pipeline()
    pipe.load_sepme(mixed_bank)
    assert pipe.erased == ()
    assert pipe.erasable == ("neon", "cat", "pencil", "woodcut")
    assert torch.equal(latents(pipe, "neon cat"), latents(plain, "neon cat"))


def test_guarded_prompts_are_unchanged_whatever_is_erased(loaded):
    """Separability: the blank prompt, the watermark and the names of the other concepts do not move."""
    every = loaded.erasable
    prompts = ["", "watermark"]
    before = {prompt: latents(loaded, prompt) for prompt in (*prompts, *every)}
    for erased in (every[:1], every[1:], every):
        loaded.set_erased(erased)
        for prompt in (*prompts, *(name for name in every if name not in erased)):
            if prompt == "woodcut":  # joined later: the first three do not know it
                continue
            assert torch.equal(latents(loaded, prompt), before[prompt])
    assert (latents(loaded, "neon") - before["neon"]).abs().max() > 1e-2


@pytest.mark.parametrize("compact", [False, True])
def test_guards_of_the_styles_bank_are_bit_exact_under_all_erasures(pocket_pipe, compact):
    """The blank prompt, the watermark, and each style's name while every other style is erased."""
    bank = pocket.bank("styles")
    pocket_pipe.load_sepme(bank.compact() if compact else bank)
    names = pocket_pipe.erasable
    prompts = ["", "watermark", *names]
    sets = [names, names, *([other for other in names if other != name] for name in names)]
    original, erased = (mixed(pocket_pipe, prompts, range(len(prompts)), erased=some) for some in ([], sets))
    assert torch.equal(erased, original)
    pocket_pipe.unload_sepme()


def test_leakage_of_every_increment_is_at_rounding(loaded, mixed_bank):
    weights = projection_weights(loaded.unet)
    for entry in mixed_bank.values():
        guards = rows(encode(loaded, entry.guards))
        for name, delta in entry.increment.delta_weights(weights).items():
            assert leakage(guards, delta, weights[name]).max() < 1e-5


def test_order_is_irrelevant_bit_for_bit(loaded):
    loaded.set_erased(["neon", "woodcut", "cat"])
    first = latents(loaded, "neon cat")
    loaded.set_erased(["cat"])
    loaded.erase("pencil")
    loaded.erase("woodcut", "neon")
    loaded.restore("pencil")
    assert loaded.erased == ("neon", "cat", "woodcut")
    assert torch.equal(latents(loaded, "neon cat"), first)


def test_restoring_is_bit_exact_and_leaves_the_rest(loaded):
    original = latents(loaded, "neon cat")
    loaded.set_erased(["pencil"])
    alone = latents(loaded, "pencil cat")
    loaded.erase("neon", "cat")
    assert not torch.equal(latents(loaded, "neon cat"), original)
    loaded.restore("cat", "neon")
    assert torch.equal(latents(loaded, "pencil cat"), alone)
    loaded.set_erased([])
    assert torch.equal(latents(loaded, "neon cat"), original)


def test_unloading_is_bit_exact(loaded, mixed_bank):
    plain = random_pipeline()
    loaded.set_erased(["neon"])
    loaded.unload_sepme()
    assert (loaded.erasable, loaded.erased, loaded.get_bank()) == ((), (), None)
    assert torch.equal(latents(loaded, "neon cat"), latents(plain, "neon cat"))
    loaded.load_sepme(mixed_bank)


def test_strength_scales_the_increment(loaded):
    loaded.set_erased({"neon": 0.5})
    half = latents(loaded, "neon cat")
    loaded.set_erased({"neon": 1.0})
    assert not torch.equal(half, latents(loaded, "neon cat"))


@pytest.mark.parametrize(
    ("concepts", "error", "message"),
    [
        (["neon", "neon"], ValueError, r"given twice: \['neon'\]"),
        ([""], ValueError, r"unknown concepts \[''\]"),
        ([3], TypeError, "strings"),
        (["neon", "pencl"], ValueError, r"unknown concepts \['pencl'\]\. Did you mean 'pencil'"),
        ("neon", TypeError, r"\['neon'\]"),
        ({"neon": 0.0}, ValueError, "finite number above zero"),
        ({"neon": float("nan")}, ValueError, "finite number above zero"),
        ({"neon": "1"}, ValueError, "finite number above zero"),
    ],
)
def test_bad_requests_leave_the_state_untouched(loaded, concepts, error, message):
    loaded.set_erased(["cat"])
    before = latents(loaded, "a cat")
    with pytest.raises(error, match=message):
        loaded.set_erased(concepts)
    assert loaded.erased == ("cat",)
    assert torch.equal(latents(loaded, "a cat"), before)


def test_misspelt_restore_is_refused(loaded):
    loaded.set_erased(["neon"])
    with pytest.raises(ValueError, match="Did you mean 'neon'"):
        loaded.restore("noen")
    assert loaded.erased == ("neon",)


def test_erasing_without_a_bank_is_refused(pipe):
    with pytest.raises(ValueError, match=r"call load_sepme\(\) first"):
        pipe.set_erased(["neon"])
    with pytest.raises(ValueError, match="no bank is loaded"):
        pipe.restore("neon")


def test_a_second_bank_under_the_same_name_is_refused_and_the_first_stays(loaded, text_bank):
    loaded.set_erased(["neon"])
    with pytest.raises(
        ValueError, match=r"another name=, replace_bank\('bank', bank\), or unload_sepme\('bank'\) first"
    ):
        loaded.load_sepme(text_bank)
    assert loaded.erased == ("neon",)


@pytest.fixture
def two_banks(pipe, text_bank, mixed_bank):
    """A bank of "neon" and "cat", and one of "cat", "pencil" and "woodcut"."""
    pipe.load_sepme(text_bank, name="ours", concepts=["neon", "cat"])
    pipe.load_sepme(mixed_bank, name="theirs", concepts=["pencil", "cat", "woodcut"])
    return pipe


def test_two_banks_erase_together_and_a_shared_name_must_be_qualified(two_banks):
    assert two_banks.erasable == ("neon", "ours/cat", "theirs/cat", "pencil", "woodcut")
    with pytest.raises(ValueError, match=r"say which: \{'cat': \['ours/cat', 'theirs/cat'\]\}"):
        two_banks.set_erased(["neon", "cat"])
    assert two_banks.erased == ()
    two_banks.set_erased(["theirs/cat", "neon", "woodcut"])
    assert two_banks.erased == ("neon", "theirs/cat", "woodcut")
    one = random_pipeline()
    one.load_sepme(two_banks.get_bank("theirs").with_entries([two_banks.get_bank("ours")["neon"]]))
    one.set_erased(["neon", "cat", "woodcut"])
    torch.testing.assert_close(latents(two_banks, "neon cat"), latents(one, "neon cat"), rtol=1e-4, atol=1e-4)


def test_a_bank_is_unloaded_by_name_and_the_other_goes_on(two_banks):
    two_banks.set_erased(["neon", "woodcut"])
    two_banks.unload_sepme("theirs")
    assert (two_banks.erasable, two_banks.erased) == (("neon", "cat"), ("neon",))
    alone = latents(two_banks, "neon cat")
    two_banks.set_erased(["neon"])
    assert torch.equal(latents(two_banks, "neon cat"), alone)
    with pytest.raises(ValueError, match=r"no bank 'theirs' is loaded; loaded: \['ours'\]"):
        two_banks.unload_sepme("theirs")
    two_banks.unload_sepme()
    assert torch.equal(latents(two_banks, "neon cat"), latents(random_pipeline(), "neon cat"))


def test_get_bank_asks_which_of_several(two_banks):
    assert list(two_banks.get_bank("ours")) == ["neon", "cat"]
    with pytest.raises(ValueError, match=r"say which of \['ours', 'theirs'\]"):
        two_banks.get_bank()
    with pytest.raises(ValueError, match="no bank 'mine'"):
        two_banks.get_bank("mine")


def test_a_second_banks_policy_joins_what_is_erased(pipe, text_bank, mixed_bank):
    pipe.load_sepme(text_bank.subset(["neon"]), name="a")
    pipe.set_erased(["neon"])
    pipe.load_sepme(replace(mixed_bank.subset(["cat", "woodcut"]), always=("cat",)), name="b")
    assert pipe.erased == ("neon", "cat")
    with pytest.raises(PolicyError, match=r"a policy always erases \['cat'\]"):
        pipe.restore_all()
    with pytest.raises(PolicyError, match="cannot be unloaded"):
        pipe.unload_sepme()
    pipe.unload_sepme("a")
    assert pipe.erased == ("cat",)


def test_restore_all_is_bit_exact(loaded):
    before = latents(loaded, "neon cat")
    loaded.set_erased(loaded.erasable)
    loaded.restore_all()
    assert loaded.erased == ()
    assert torch.equal(latents(loaded, "neon cat"), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_restores_and_passes_by_bit_for_bit(mixed_bank, dtype):
    plain, pipe = random_pipeline().to(dtype), random_pipeline().to(dtype)
    pipe.load_sepme(mixed_bank)
    original = latents(plain, "neon cat")
    assert torch.equal(latents(pipe, "neon cat"), original)
    pipe.set_erased(["neon", "cat"])
    erased = latents(pipe, "neon cat")
    assert not torch.equal(erased, original)
    pipe.set_erased(["cat", "woodcut"])
    pipe.restore("woodcut")
    pipe.erase("neon")
    assert torch.equal(latents(pipe, "neon cat"), erased)
    pipe.restore_all()
    assert torch.equal(latents(pipe, "neon cat"), original)


def strange_bank(bank, kind):
    entry = bank["neon"]
    if kind == "width":
        narrow = replace(entry, increment=Increment(torch.randn(2, 8), B=torch.randn(8, 2)))
        tokens = replace(bank.base.doors["tokens"], width=8)
        return ConceptBank(replace(bank.base, doors={"tokens": tokens}), {"neon": narrow})
    other = {f"other.{name}": c for name, c in bank["woodcut"].increment.C.items()}
    return bank.with_entries([replace(bank["woodcut"], increment=Increment(bank["woodcut"].increment.A, C=other))])


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (lambda pipe, bank: pipe.load_sepme("nowhere/at/all"), BankError, "neither a folder nor a repository id"),
        (lambda pipe, bank: pipe.load_sepme(bank, name="more", concepts=["ghost"]), KeyError, "ghost"),
        (lambda pipe, bank: pipe.load_sepme(bank, name="more", concepts="neon"), TypeError, r"\['neon'\]"),
        (lambda pipe, bank: pipe.load_sepme(bank, name="more", revision="x"), TypeError, "revision"),
        (lambda pipe, bank: pipe.load_sepme(strange_bank(bank, "width"), name="more"), ValueError, "8 wide, not 384"),
        (
            lambda pipe, bank: pipe.load_sepme(strange_bank(bank, "modules"), name="more"),
            ValueError,
            "other modules than the base",
        ),
    ],
)
def test_a_bank_that_cannot_be_loaded_changes_nothing(loaded, mixed_bank, load, error, message):
    loaded.set_erased(["neon"])
    before = latents(loaded, "neon cat")
    with pytest.raises(error, match=message):
        load(loaded, mixed_bank)
    assert (loaded.erasable, loaded.erased) == (("neon", "cat", "pencil", "woodcut"), ("neon",))
    assert torch.equal(latents(loaded, "neon cat"), before)


def test_without_a_text_encoder_a_bank_is_not_trusted(pipe, text_bank):
    embeds = {"prompt_embeds": encode(pipe, ["neon cat"]), "negative_prompt_embeds": encode(pipe, [""])}
    encoder, pipe.text_encoder = pipe.text_encoder, None
    with pytest.raises(ValueError, match="no text encoder"):
        pipe.load_sepme(text_bank)
    pipe.text_encoder = encoder
    pipe.load_sepme(text_bank)
    pipe.set_erased(["neon"])
    expected = latents(pipe, "neon cat")
    pipe.text_encoder = None
    torch.testing.assert_close(latents(pipe, None, **embeds), expected)


def test_a_bank_from_disk_erases_as_the_one_in_memory(loaded, mixed_bank, tmp_path):
    mixed_bank.save_pretrained(tmp_path / "bank")
    other = random_pipeline()
    other.load_sepme(tmp_path / "bank")
    for pipe in (loaded, other):
        pipe.set_erased(["neon", "woodcut"])
    assert torch.equal(latents(other, "neon cat"), latents(loaded, "neon cat"))


def test_a_policy_is_in_force_from_loading_on(pipe, text_bank):
    pipe.load_sepme(replace(text_bank, always=("cat",)))
    assert pipe.erased == ("cat",)
    for attempt in (lambda: pipe.restore("cat"), pipe.restore_all, pipe.unload_sepme):
        with pytest.raises(PolicyError, match=r"always erases \['cat'\]"):
            attempt()
    assert pipe.erased == ("cat",)
    pipe.set_erased(["neon"])
    assert pipe.erased == ("neon", "cat")


def test_another_text_encoder_is_refused(text_bank):
    stranger = random_pipeline(text_seed=5)
    with pytest.raises(ValueError, match="another text encoder"):
        stranger.load_sepme(text_bank)
    assert stranger.get_bank() is None
    assert stranger.erasable == ()


def test_text_side_increments_serve_another_unet_and_per_module_ones_do_not(text_bank, mixed_bank):
    fine_tune = random_pipeline(seed=9)
    with pytest.raises(ValueError, match="this UNet has other weights"):
        fine_tune.load_sepme(mixed_bank)
    fine_tune.load_sepme(text_bank)
    before = latents(fine_tune, "watermark"), latents(fine_tune, "neon dog")
    fine_tune.set_erased(["neon"])
    torch.testing.assert_close(latents(fine_tune, "watermark"), before[0], rtol=0, atol=1e-4)
    assert not torch.equal(latents(fine_tune, "neon dog"), before[1])


def test_an_unrelated_lora_does_not_switch_an_erasure_off(loaded):
    """Loading, activating and unloading a LoRA through diffusers leaves the erasure acting."""
    loaded.set_erased(["neon"])
    erased = latents(loaded, "neon cat")
    loaded.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v", "to_q"]), "style")
    torch.testing.assert_close(latents(loaded, "neon cat"), erased)  # a fresh LoRA is the identity
    loaded.set_adapters("style")
    loaded.disable_lora()
    torch.testing.assert_close(latents(loaded, "neon cat"), erased)
    loaded.unload_lora_weights()
    assert torch.equal(latents(loaded, "neon cat"), erased)


def test_fused_projections_are_refused_for_per_module_increments_alone(loaded):
    """They are edited behind to_k and to_v; text-side increments act before anything reads the text."""
    loaded.set_erased(["neon"])
    expected = latents(loaded, "neon cat")
    loaded.unet.fuse_qkv_projections()
    torch.testing.assert_close(latents(loaded, "neon cat"), expected)
    with pytest.raises(ErasureNotInForce, match=r"\['woodcut'\] should be erased.*unfuse_qkv_projections"):
        latents(loaded, "neon cat", erased=["woodcut"])
    loaded.unet.unfuse_qkv_projections()
    assert torch.equal(latents(loaded, "neon cat"), expected)


def test_a_swapped_unet_is_refused(loaded):
    loaded.set_erased(["neon"])
    loaded.unet = random_pipeline().unet
    with pytest.raises(ErasureNotInForce, match="replaced"):
        latents(loaded, "neon cat")


def test_saved_pipeline_is_the_plain_one(loaded, tmp_path):
    loaded.set_erased(["neon"])
    loaded.save_pretrained(tmp_path)
    back = SepMEPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert back.erased == ()
    assert torch.equal(latents(back, "neon cat"), latents(random_pipeline(), "neon cat"))


def test_a_plain_pipeline_around_the_unet_raises_or_has_the_standing_set(pipe, text_bank):
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    pipe.load_sepme(text_bank)
    with pytest.raises(ErasureNotInForce, match=r"attach\(pipe\)"):
        latents(other, "neon cat")
    pipe.unload_sepme()
    pipe.load_sepme(text_bank, plain_pipelines="standing")
    pipe.set_erased(["neon"])
    torch.testing.assert_close(latents(other, "neon cat"), latents(pipe, "neon cat"))


def test_erased_for_one_call_alone(loaded):
    loaded.set_erased(["neon"])
    standing = latents(loaded, "neon cat")
    loaded.set_erased(["cat", "pencil"])
    expected = latents(loaded, "neon cat")
    loaded.set_erased(["neon"])
    assert torch.equal(latents(loaded, "neon cat", erased=["pencil", "cat"]), expected)
    assert loaded.erased == ("neon",)
    assert torch.equal(latents(loaded, "neon cat"), standing)
    assert torch.equal(latents(loaded, "neon cat", erased=[]), latents(random_pipeline(), "neon cat"))


def test_a_generator_of_names_erases_what_it_names(loaded):
    """It can be read once only; read twice it would erase nothing and say nothing."""
    expected = latents(loaded, "neon cat", erased=["neon", "cat"])
    assert torch.equal(latents(loaded, "neon cat", erased=(name for name in ("neon", "cat"))), expected)
    sets = (names for names in (["neon", "cat"],))
    assert torch.equal(latents(loaded, ["neon cat"], erased=sets), expected)


def test_a_pipeline_that_shares_the_unet_shares_the_bank_and_its_policy(pipe, text_bank):
    pipe.load_sepme(replace(text_bank, always=("cat",)))
    other = SepMEPipeline(**pipe.components, requires_safety_checker=False)
    assert other.get_bank() is pipe.get_bank()
    other.set_erased(["neon"])
    assert pipe.erased == ("neon", "cat")
    for attempt in (lambda: other.restore("cat"), other.restore_all, other.unload_sepme):
        with pytest.raises(PolicyError, match=r"always erases \['cat'\]"):
            attempt()


def test_a_bank_unloaded_behind_a_pipelines_back_is_noticed(loaded):
    other = SepMEPipeline(**loaded.components, requires_safety_checker=False)
    other.unload_sepme()
    with pytest.raises(ErasureNotInForce, match="load the banks again"):
        latents(loaded, "neon cat")


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_call_leaves_no_trace(loaded, interruption):
    loaded.set_erased(["neon"])
    before = latents(loaded, "neon cat")

    def stop(*_):
        raise interruption

    with pytest.raises(interruption):
        latents(loaded, "neon cat", erased=["cat"], callback_on_step_end=stop)
    assert torch.equal(latents(loaded, "neon cat"), before)


def mixed(pipe, prompts, seeds, **kwargs):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"} | kwargs
    return pipe(prompts, generator=generators, **settings).images


def test_each_prompt_of_a_batch_has_its_own_erased_set(loaded):
    """A prompt in a mixed batch gives what it gives alone; one that erases nothing gives the plain picture.

    Up to the rounding that the size of a batch makes in the plain pipeline too.
    """
    prompts, sets = ["neon cat", "neon cat", "pencil cat"], [["neon"], [], {"pencil": 1.0, "cat": 0.5}]
    together = mixed(loaded, prompts, [0, 0, 1], erased=sets)
    for row, (prompt, concepts, seed) in enumerate(zip(prompts, sets, [0, 0, 1], strict=True)):
        alone = mixed(loaded, [prompt], [seed], erased=concepts)[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1], mixed(random_pipeline(), ["neon cat"], [0])[0], rtol=1e-4, atol=1e-4)
    assert loaded.erased == ()


@pytest.mark.parametrize("form", ["text", "module"])
def test_a_prompt_in_a_mixed_batch_is_what_it_is_alone(pocket_pipe, form):
    """On the trained model over twenty steps: to 1e-5, as close as a plain batch comes to its prompts."""
    prompts = ["a fox in the style of woodcut", "a neon owl", "a dog", "a neon pig"]
    sets = [["woodcut"], ["neon", "pencil"], [], {"mosaic": 0.5}]
    bank = pocket.bank("styles").subset(["woodcut", "neon", "pencil", "mosaic"])
    if form == "module":
        weights = projection_weights(pocket_pipe.unet)
        bank = bank.with_entries(replace(e, increment=e.increment.expand(weights)) for e in bank.values())
    pocket_pipe.load_sepme(bank)
    settings = {"num_inference_steps": 20}
    together = mixed(pocket_pipe, prompts, range(4), erased=sets, **settings)
    for row, (prompt, concepts) in enumerate(zip(prompts, sets, strict=True)):
        alone = mixed(pocket_pipe, [prompt], [row], erased=concepts, **settings)[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)
    pocket_pipe.unload_sepme()


@pytest.mark.parametrize("how", ["images_per_prompt", "prompt_embeds", "no_guidance"])
def test_per_prompt_sets_reach_their_pictures_however_they_are_asked_for(loaded, how):
    sets, prompts = [["neon"], []], ["neon cat", "neon cat"]
    kwargs, seeds = {}, [0, 0]
    if how == "images_per_prompt":
        kwargs, seeds = {"num_images_per_prompt": 2}, [0, 1, 0, 1]
    elif how == "prompt_embeds":
        kwargs = {"prompt_embeds": encode(loaded, prompts), "negative_prompt_embeds": encode(loaded, ["", ""])}
        prompts = None
    else:
        kwargs = {"guidance_scale": 1.0}
    both = mixed(loaded, prompts, seeds, erased=sets, **kwargs)
    plain = mixed(loaded, prompts, seeds, **kwargs)
    half = len(both) // 2
    torch.testing.assert_close(both[half:], plain[half:], rtol=1e-4, atol=1e-4)
    assert ((both[:half] - plain[:half]).abs().amax((1, 2, 3)) > 1e-3).all()


def test_wrong_number_of_sets_is_refused_with_both_numbers(loaded):
    with pytest.raises(ValueError, match="2 erased sets for 3 prompts"):
        mixed(loaded, ["a", "b", "c"], [0, 1, 2], erased=[["neon"], []])


def test_a_call_cannot_undercut_the_policy(pipe, text_bank):
    """What is always erased joins a call's set; of two strengths the larger."""
    pipe.load_sepme(replace(text_bank, always=("cat",)))
    mixed(pipe, ["a", "b"], [0, 1], erased=["neon"])
    assert pipe.last_call.erased == ({"neon": 1.0, "cat": 1.0},) * 2
    mixed(pipe, ["a", "b"], [0, 1], erased=[[], {"cat": 0.5}])
    assert pipe.last_call.erased == ({"cat": 1.0},) * 2
    mixed(pipe, ["a", "b"], [0, 1], erased=[{"cat": 2.0}, None])
    assert pipe.last_call.erased == ({"cat": 2.0}, {"cat": 1.0})


def test_xl_guards_erases_per_prompt_and_restores():
    """The pooled embedding is the prompt's own, so a guarded prompt is still exactly guarded."""
    pipe = random_xl_pipeline()
    config = replace(CLOSED, rank=3)
    bank = SepMETrainer(pipe, config, guards=["watermark"]).erase(CONCEPTS[:1])
    before = {prompt: latents(pipe, prompt) for prompt in ("", "watermark", "neon cat")}
    pipe.load_sepme(bank)
    pipe.set_erased({"neon": 20.0})
    for prompt in ("", "watermark"):
        torch.testing.assert_close(latents(pipe, prompt), before[prompt], rtol=0, atol=1e-4)
    assert not torch.equal(latents(pipe, "neon cat"), before["neon cat"])
    pipe.restore("neon")
    assert torch.equal(latents(pipe, "neon cat"), before["neon cat"])
    both = mixed(pipe, ["neon cat", "neon cat"], [0, 0], erased=[{"neon": 20.0}, []])
    torch.testing.assert_close(both[1], mixed(pipe, ["neon cat"], [0])[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(both[0], both[1])


def test_attach_gives_another_pipeline_the_same_erasures(pipe, mixed_bank, tmp_path):
    plain = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (8, 8), "red")

    def draw(prompt):
        seed = torch.Generator().manual_seed(0)
        return plain(prompt, image, num_inference_steps=4, generator=seed, output_type="latent").images

    original = draw("neon cat")
    attached = attach(plain)
    assert attached is plain
    assert attach(attached) is attached
    assert type(attached).__name__ == "StableDiffusionImg2ImgPipeline"
    attached.load_sepme(mixed_bank)
    assert torch.equal(draw("neon cat"), original)
    attached.set_erased(["neon", "woodcut"])
    assert not torch.equal(draw("neon cat"), original)
    attached.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionImg2ImgPipeline
    attached.restore("neon", "woodcut")
    assert torch.equal(draw("neon cat"), original)


def test_a_video_pipeline_has_one_set_per_prompt(pipe, text_bank):
    """A prompt has a text row for each of its frames."""
    adapter = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2,
        motion_max_seq_length=4,
    )  # fmt: skip
    video = attach(
        AnimateDiffPipeline(
            vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=pipe.unet,
            motion_adapter=adapter, scheduler=pipe.scheduler,
        )
    )  # fmt: skip
    video.set_progress_bar_config(disable=True)

    def frames(**kwargs):
        seed = torch.Generator().manual_seed(0)
        settings = {"num_frames": 2, "num_inference_steps": 2, "generator": seed, "output_type": "latent"}
        return video(**{"prompt": "neon cat"} | settings | kwargs).frames

    original = frames()
    video.load_sepme(text_bank)
    assert torch.equal(frames(), original)
    assert not torch.equal(frames(erased=["neon"]), original)
    two = ["neon cat", "neon cat"]
    plain, both, mixed = (frames(prompt=two, erased=erased) for erased in ([], ["neon"], [["neon"], []]))
    assert torch.equal(mixed[1], plain[1])
    torch.testing.assert_close(mixed[0], both[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed[0], plain[0], atol=1e-2)
    assert torch.equal(frames(), original)


def test_attach_refuses_what_it_cannot_erase_on(pipe):
    unet = UNet2DModel(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    with pytest.raises(TypeError, match="DDIMPipeline has no encode_prompt"):
        attach(DDIMPipeline(unet, pipe.scheduler))


@pytest.mark.slow
def test_true_stable_diffusion_1_shape(tmp_path):
    """The whole path at Stable Diffusion 1.5's true architecture with random weights."""
    tokenizer = CLIPTokenizer.from_pretrained(pocket.path(), subfolder="tokenizer", model_max_length=77)
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    pipe = SepMEPipeline(
        vae=AutoencoderKL(block_out_channels=(32, 32, 32, 32)), text_encoder=text.eval(), tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64}
    bank = SepMETrainer(pipe, SepMEConfig.linear(rank=8), guards=["watermark"]).erase(CONCEPTS[:2])
    bank.save_pretrained(tmp_path / "bank", torch.float16)
    assert sum(file.stat().st_size for file in (tmp_path / "bank").glob("increments-*")) < 2 * 40_000
    before = {prompt: latents(pipe, prompt, **size) for prompt in ("", "watermark", "neon", "a cat in neon")}
    pipe.load_sepme(tmp_path / "bank")
    pipe.set_erased({"neon": 5.0, "cat": 5.0})
    assert not torch.equal(latents(pipe, "a cat in neon", **size), before["a cat in neon"])
    pipe.set_erased(["cat"])
    for prompt in ("", "watermark", "neon"):
        torch.testing.assert_close(latents(pipe, prompt, **size), before[prompt], rtol=0, atol=1e-4)
    pipe.restore("cat")
    assert torch.equal(latents(pipe, "a cat in neon", **size), before["a cat in neon"])
