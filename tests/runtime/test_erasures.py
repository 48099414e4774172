"""What is loaded and erased on a denoiser, seen by passes of the denoiser itself."""

import copy
import pickle
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.models.attention_processor import AttnProcessor

from sepme_diffusers import (
    BaseModel,
    Concept,
    ConceptBank,
    Entry,
    ErasureNotInForce,
    Increment,
    SepMEConfig,
    SepMETrainer,
    attach,
)
from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.bank.fingerprint import Encoding, Fingerprint
from sepme_diffusers.bank.guard_sets import GuardSet
from sepme_diffusers.doors.linears import projection_shapes, text_projections
from sepme_diffusers.runtime.calls import Call
from sepme_diffusers.runtime.erasures import Erasures, erasures_of
from sepme_diffusers.runtime.snapshot import LoadOptions
from sepme_diffusers.text.encoding import encode_doors
from small import CLOSED, CONCEPTS, WIDTH, latents, random_pipeline, random_xl_pipeline

PLAIN = LoadOptions(plain_pipelines=True)


def increments(unet, names, rank=2, form="text", seed=1):
    """Increments that change an embedding, or what a Linear gives, by about its own length."""
    torch.manual_seed(seed)
    shapes, made = projection_shapes(unet), {}
    d = unet.config.cross_attention_dim
    for name in names:
        a, b = torch.randn(rank, d) / d**0.5, torch.randn(d, rank)
        c = {module: torch.randn(d_out, rank) for module, (d_out, _) in shapes.items()}
        made[name] = Increment(a, **({"B": b} if form == "text" else {"C": c}))
    return made


def bank_of(found, unet):
    shapes = {name: (d_out, 1.0) for name, (d_out, _) in projection_shapes(unet).items()}
    base = BaseModel("base", {"tokens": Encoding(unet.config.cross_attention_dim, 16)}, projections=shapes)
    blank = GuardSet(("",))
    return ConceptBank(base, {name: Entry(Concept(name), one, SepMEConfig(), blank) for name, one in found.items()})


def with_bank(unet, found):
    """A denoiser with a bank, whose standing set acts on passes outside any call."""
    erasures = Erasures([unet])
    erasures.load("bank", bank_of(found, unet), PLAIN)
    return erasures


def keyed(strengths):
    return {("bank", name): strength for name, strength in strengths.items()}


def erase(erasures, strengths):
    snapshot = erasures.snapshot
    erasures.publish(snapshot.erasing(keyed(strengths)))


@contextmanager
def call_of(erasures, *sets):
    """A call whose passes are made by hand, one set per picture."""
    rows, snapshot = [keyed(strengths) for strengths in sets], erasures.snapshot
    call = Call(erasures.attachments, snapshot, rows, snapshot.active(rows, len(rows)), own=True, pictures=len(rows))
    erasures.begin(call)
    try:
        with call:
            yield call
    finally:
        erasures.end(call)


def text(rows=2, seed=0):
    return torch.randn(rows, 16, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(unet, e):
    """What the denoiser gives for an embedding, from fixed noise."""
    noise = torch.randn(len(e), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return unet(noise.to(e.dtype), 10, encoder_hidden_states=e).sample


def projected(unet, e):
    """What each text projection gives in a pass."""
    found, handles = {}, []
    for name, module in text_projections(unet).items():
        note = lambda module, inputs, output, name=name: found.__setitem__(name, output)  # noqa: E731
        handles.append(module.register_forward_hook(note))
    run(unet, e)
    for handle in handles:
        handle.remove()
    return found


def hooks(module):
    return [name for name, part in module.named_modules() if part._forward_hooks or part._forward_pre_hooks]


def edit_densely(unet, found, strengths):
    """Write Σ strength ΔW into the projections' weights."""
    modules = text_projections(unet)
    weights = {name: module.weight.detach().clone() for name, module in modules.items()}
    with torch.no_grad():
        for key, strength in strengths.items():
            for name, delta in found[key].delta_weights(weights).items():
                modules[name].weight += strength * delta


@pytest.fixture
def unet(pipe):
    return pipe.unet


@pytest.mark.parametrize("forms", [("text", "text"), ("module", "module"), ("text", "module"), ("module", "text")])
def test_active_increments_add_up_to_the_dense_edit(unet, forms):
    """y = e (W + Σ strength ΔW)ᵀ, whatever their form: per-module increments read the unedited e."""
    e, strengths = text(), {"c": 0.5, "a": 1.0}
    found = increments(unet, "ab", form=forms[0]) | increments(unet, "c", form=forms[1], seed=2)
    plain, dense = run(unet, e), copy.deepcopy(unet)
    edit_densely(dense, found, strengths)
    erase(with_bank(unet, found), strengths)
    assert (run(unet, e) - plain).abs().max() > 0.05
    torch.testing.assert_close(run(unet, e), run(dense, e), rtol=1e-4, atol=1e-4)


def test_order_of_calls_leaves_no_trace(unet):
    e, erasures = text(), with_bank(unet, increments(unet, "ab") | increments(unet, "cd", form="module"))
    erase(erasures, {"a": 1, "b": 1, "d": 1})
    first = run(unet, e)
    for strengths in ({"d": 1}, {}, {"c": 2, "a": 1}, {"d": 1, "b": 1, "a": 1}):
        erase(erasures, strengths)
        run(unet, e)
    assert torch.equal(run(unet, e), first)


def test_banks_add_up_in_the_order_of_their_names_not_of_loading(unet):
    e, made = text(), []
    some, more = (bank_of(increments(unet, names), unet) for names in ("ab", "cd"))
    standing = {("y", "c"): 1.0, ("x", "a"): 1.0, ("x", "b"): 1.0}
    for order in (("x", some), ("y", more)), (("y", more), ("x", some)):
        erasures = Erasures([unet])
        for name, bank in order:
            erasures.load(name, bank, PLAIN)
        erasures.publish(erasures.snapshot.erasing(standing))
        made.append(run(unet, e))
        erasures.unload(["x", "y"])
    assert torch.equal(*made)


@pytest.mark.parametrize("form", ["text", "module"])
def test_restoring_and_unloading_are_bit_exact(unet, form):
    e, keys = text(), set(unet.state_dict())
    before = run(unet, e)
    erasures = with_bank(unet, increments(unet, "ab", form=form))
    assert set(unet.state_dict()) == keys
    erase(erasures, {"a": 1, "b": 1})
    assert not torch.equal(run(unet, e), before)
    erase(erasures, {})
    assert torch.equal(run(unet, e), before)
    erase(erasures, {"a": 1})
    run(unet, e)
    erasures.unload(["bank"])
    assert torch.equal(run(unet, e), before)
    assert hooks(unet) == []


def test_a_bank_that_is_unloaded_leaves_what_the_other_erases(unet):
    e, erasures = text(), with_bank(unet, increments(unet, "a"))
    erase(erasures, {"a": 1})
    alone = run(unet, e)
    erasures.load("more", bank_of(increments(unet, "b", form="module"), unet), PLAIN)
    assert torch.equal(run(unet, e), alone)
    erasures.erase_exactly(lambda snapshot: {**snapshot.standing, ("more", "b"): 1.0})
    assert not torch.equal(run(unet, e), alone)
    erasures.unload(["more"])
    assert torch.equal(run(unet, e), alone)
    assert erasures.snapshot.standing == keyed({"a": 1})


def test_nothing_is_registered_before_something_is_loaded(unet):
    Erasures([unet])
    assert hooks(unet) == []


@pytest.mark.parametrize("form", ["text", "module"])
def test_a_row_that_erases_nothing_is_bit_identical_beside_one_that_does(unet, form):
    e = text(1).repeat(2, 1, 1)
    before, erasures = run(unet, e), with_bank(unet, increments(unet, "ab", form=form))
    with call_of(erasures, {"a": 1.0}, {}):
        edited = run(unet, e)
    assert torch.equal(edited[1], before[1])
    assert not torch.equal(edited[0], before[0])


def test_few_of_very_many_act_as_if_the_others_were_not_loaded(unet):
    """Beyond the embedding's width only the active increments are gathered; the result is that of a small bank."""
    e, many = text(), increments(unet, [f"c{index}" for index in range(300)])
    assert sum(one.rank for one in many.values()) > WIDTH
    asked = {"c7": 1.0, "c250": 0.5}
    erasures, plain = with_bank(unet, many), run(unet, e)
    erase(erasures, asked)
    gathered = run(unet, e)
    erasures.unload(["bank"])
    erase(with_bank(unet, {name: many[name] for name in asked}), asked)
    torch.testing.assert_close(run(unet, e), gathered, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(gathered, plain, atol=1e-3)


def test_rows_of_very_many_gather_what_any_of_them_asks_for(unet):
    e, many = text(1).repeat(2, 1, 1), increments(unet, [f"c{index}" for index in range(300)])
    erasures = with_bank(unet, many)
    with call_of(erasures, {"c7": 1.0}, {"c250": 0.5}):
        both = run(unet, e)
    for row, asked in enumerate(({"c7": 1.0}, {"c250": 0.5})):
        with call_of(erasures, asked):
            torch.testing.assert_close(both[row], run(unet, e)[row], rtol=1e-5, atol=1e-5)


def test_unknown_increment_changes_nothing(unet):
    e, erasures = text(), with_bank(unet, increments(unet, "ab"))
    erase(erasures, {"a": 1})
    before, snapshot = run(unet, e), erasures.snapshot
    with pytest.raises(KeyError, match="'z'"):
        erase(erasures, {"b": 1, "z": 1})
    assert erasures.snapshot is snapshot
    assert torch.equal(run(unet, e), before)


def test_a_bank_that_cannot_be_loaded_leaves_the_others_in_force(unet):
    e, erasures = text(), with_bank(unet, increments(unet, "ab"))
    erase(erasures, {"a": 1})
    before = run(unet, e)
    with pytest.raises(ValueError, match="'bank' is loaded already"):
        erasures.load("bank", bank_of(increments(unet, "c"), unet), PLAIN)
    with pytest.raises(ValueError, match="has no '/'"):
        erasures.load("more/b", bank_of(increments(unet, "c"), unet), PLAIN)
    assert list(erasures.snapshot.banks) == ["bank"]
    assert torch.equal(run(unet, e), before)


def test_a_first_bank_that_cannot_be_loaded_leaves_the_denoiser_plain(unet):
    erasures = Erasures([unet])
    with pytest.raises(ValueError, match="has no '/'"):
        erasures.load("a/b", bank_of(increments(unet, "c"), unet), PLAIN)
    assert not erasures.snapshot.banks
    assert hooks(unet) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["text", "module"])
def test_low_precision_models_get_the_increment_in_full_precision(unet, dtype, form):
    """What a projection gives is the exact edit, rounded as often as the plain one and once more."""
    e, found = text().to(dtype), increments(unet, "a", form=form)
    unet.to(dtype)
    plain, before = run(unet, e), projected(unet, e)
    weights = {name: module.weight.float() for name, module in text_projections(unet).items()}
    changes = {name: e.float() @ delta.T for name, delta in found["a"].delta_weights(weights).items()}
    erasures = with_bank(unet, found)
    erase(erasures, {"a": 1})
    for name, y in projected(unet, e).items():
        assert y.dtype == dtype
        error = (y.float() - before[name].float() - changes[name]).norm() / changes[name].norm()
        assert error < 2 * torch.finfo(dtype).eps
    erase(erasures, {})
    assert torch.equal(run(unet, e), plain)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_a_copied_denoiser_erases_by_itself(unet, duplicate):
    e, erasures = text(), with_bank(unet, increments(unet, "a") | increments(unet, "b", form="module"))
    plain = run(unet, e)
    erase(erasures, {"a": 1, "b": 1})
    expected, twin = run(unet, e), duplicate(unet)
    erase(erasures, {})
    assert torch.equal(run(twin, e), expected)
    assert torch.equal(run(unet, e), plain)
    own = erasures_of(twin)
    erase(own, {})
    assert torch.equal(run(twin, e), plain)
    own.check([twin])
    own.unload(["bank"])
    assert hooks(twin) == []
    assert torch.equal(run(twin, e), plain)


def test_a_removed_hook_is_named(unet):
    erasures = with_bank(unet, increments(unet, "a", form="module"))
    erasures.check([unet])
    next(iter(text_projections(unet).values()))._forward_hooks.clear()
    with pytest.raises(ErasureNotInForce, match="hooks on Linear of UNet2DConditionModel were removed"):
        erasures.check([unet])


def test_a_replaced_projection_is_named(unet):
    erasures = with_bank(unet, increments(unet, "a", form="module"))
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attention.to_k = copy.deepcopy(attention.to_k)
    with pytest.raises(ErasureNotInForce, match=r"attn2\.to_k.*were replaced"):
        erasures.check([unet])


class ReadsForItself(AttnProcessor):
    """A processor that multiplies by to_k's weight instead of calling to_k."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        keys = encoder_hidden_states @ attn.to_k.weight.T
        return attn.to_out[0](attn.to_q(hidden_states) * keys.mean(dim=1, keepdim=True))


def bypass(unet):
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.set_processor(ReadsForItself())


def test_a_pass_that_bypasses_a_projection_is_refused_for_per_module_increments(unet):
    """In every pass, also when the processor comes between two of them, and only while something is erased."""
    e, erasures = text(), with_bank(unet, increments(unet, "a", form="module"))
    with call_of(erasures, {"a": 1.0}):
        run(unet, e)
        bypass(unet)
        for _ in range(2):
            with pytest.raises(ErasureNotInForce, match=r"attn2\.to_k.*bypassed"):
                run(unet, e)
    with call_of(erasures, {}):
        run(unet, e)


def test_a_processor_does_not_matter_for_text_side_increments(unet):
    e, found = text(), increments(unet, "a")
    bypass(unet)
    one = found["a"]
    expected = run(unet, e + e @ one.A.T @ one.B.T)
    erase(with_bank(unet, found), {"a": 1})
    torch.testing.assert_close(run(unet, e), expected, rtol=1e-4, atol=1e-4)


def test_forward_called_directly_is_refused(unet):
    e, erasures = text(), with_bank(unet, increments(unet, "a"))
    erase(erasures, {"a": 1})
    run(unet, e)
    for _ in range(2):
        with pytest.raises(ErasureNotInForce, match="forward was called directly"):
            unet.forward(torch.zeros(2, 4, 8, 8), 10, e)
    run(unet, e)


def test_a_pass_without_text_is_refused(unet):
    erasures = with_bank(unet, increments(unet, "a"))
    erase(erasures, {"a": 1})
    for kwargs in ({}, {"added_cond_kwargs": {}}):
        with pytest.raises(ErasureNotInForce, match=r"brought no text by any of .'encoder_hidden_states'"):
            unet(torch.zeros(2, 4, 8, 8), 10, None, **kwargs)


@pytest.mark.parametrize("fails", ["before the doors are passed", "between the doors and the entry"])
def test_after_a_pass_that_failed_forward_called_directly_is_refused_still(unet, fails):
    """A pass that was let through the doors, but did not reach the entry, must not let in the next one."""
    e, erasures = text(), with_bank(unet, increments(unet, "a"))
    erase(erasures, {"a": 1})
    if fails == "before the doors are passed":
        with pytest.raises(ErasureNotInForce):
            unet(torch.zeros(2, 4, 8, 8), 10, None)
    else:
        with pytest.raises(ValueError, match="too many dimensions"):
            unet(torch.zeros(2, 4, 8, 8), "ten", e)
    with pytest.raises(ErasureNotInForce, match="forward was called directly"):
        unet.forward(torch.zeros(2, 4, 8, 8), 10, e)


def test_positional_and_keyword_embeddings_are_edited_alike_and_stay_as_they_were(unet):
    e, noise = text(), torch.zeros(2, 4, 8, 8)
    with torch.no_grad():
        plain = unet(noise, 10, e).sample
        erase(with_bank(unet, increments(unet, "a")), {"a": 1})
        before = e.clone()
        by_place, by_name = unet(noise, 10, e).sample, unet(noise, 10, encoder_hidden_states=e).sample
    assert torch.equal(by_place, by_name)
    assert not torch.equal(by_place, plain)
    assert torch.equal(e, before)


class PutsBack:
    """A hook on the denoiser that puts other embeddings in the place of the prompt's."""

    def __init__(self, e):
        self.e = e

    def __call__(self, module, args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": self.e}


def test_a_hook_registered_after_the_edit_does_not_undo_it(pipe, text_bank):
    plain = latents(pipe, "neon cat")
    pipe.load_sepme(text_bank)
    erased = latents(pipe, "neon cat", erased=["neon"])
    assert not torch.allclose(erased, plain, atol=1e-3)
    e = torch.cat(pipe.encode_prompt("neon cat", "cpu", 1, True)[::-1])
    handle = pipe.unet.register_forward_pre_hook(PutsBack(e), with_kwargs=True)
    assert torch.equal(latents(pipe, "neon cat", erased=["neon"]), erased)
    handle.remove()


@pytest.mark.parametrize("when", [0, 2])
def test_a_hook_registered_in_the_middle_of_a_call_is_noticed(pipe, text_bank, when):
    """In the next pass, or after the last one."""
    pipe.load_sepme(text_bank)
    e = torch.cat(pipe.encode_prompt("neon cat", "cpu", 1, True)[::-1])

    def register(pipe, step, timestep, tensors):
        if step == when:
            pipe.unet.register_forward_pre_hook(PutsBack(e), with_kwargs=True)
        return tensors

    with pytest.raises(ErasureNotInForce, match=r"'neon'.* should be erased.*comes after the edit and could undo it"):
        latents(pipe, "neon cat", erased=["neon"], callback_on_step_end=register)


def test_unloading_leaves_no_hooks_on_the_denoisers_that_help(pipe, text_bank):
    """A ControlNet that read the edited text is the plain one again."""
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16,)).eval()
    parts = {**pipe.components, "controlnet": net}
    steered = attach(StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))
    steered.set_progress_bar_config(disable=True)
    steered.load_sepme(text_bank)
    latents(steered, "neon cat", image=torch.rand(1, 3, 8, 8), erased=["neon"])
    steered.unload_sepme()
    assert hooks(pipe.unet) == []
    assert hooks(net) == []


# --- the pooled embedding of SDXL


@pytest.fixture(scope="module")
def xl():
    """A pipeline, and a bank whose increment edits the pooled embedding as well, its guards left out."""
    pipe = random_xl_pipeline()
    bank = SepMETrainer(pipe, replace(CLOSED, rank=3), guards=["", "watermark"]).erase(CONCEPTS[:1])
    pooled = encode_doors(pipe, ["", "watermark", "neon cat"])["pooled"][:, 0]
    null = null_space(pooled[:2])
    a = ((pooled[2:].double() @ null.T) @ null).float()
    torch.manual_seed(0)
    further = {"pooled": Increment(a / a.norm(), B=20 * torch.randn(a.shape[1], 1))}
    entries = [replace(entry, increment=replace(entry.increment, doors=further)) for entry in bank.values()]
    base = replace(bank.base, doors=Fingerprint.of_text(pipe).doors)
    return pipe, replace(bank, base=base).with_entries(entries)


class Noted:
    """What the denoiser's own forward was given."""

    def __init__(self, unet):
        self.kwargs = []
        self.handle = unet.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output):
        self.kwargs.append(kwargs)


def test_the_pooled_embedding_is_edited_in_a_copy_of_the_dictionary(xl):
    pipe, bank = xl
    given = {"text_embeds": encode_doors(pipe, ["neon cat"])["pooled"][:, 0], "time_ids": torch.zeros(1, 6)}
    tensors = dict(given)
    before = given["text_embeds"].clone()
    e = encode_doors(pipe, ["neon cat"])["tokens"]
    erasures = Erasures([pipe.unet])
    erasures.load("bank", bank, PLAIN)
    erase(erasures, {"neon": 1.0})
    try:
        noted = Noted(pipe.unet)
        with torch.no_grad():
            pipe.unet(torch.zeros(1, 4, 16, 16), 10, e, added_cond_kwargs=given)
        one = bank["neon"].increment.doors["pooled"]
        seen = noted.kwargs[0]["added_cond_kwargs"]
        torch.testing.assert_close(seen["text_embeds"], before + before @ one.A.T @ one.B.T, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(seen["text_embeds"], before)
        assert seen["time_ids"] is given["time_ids"]
        assert given.keys() == tensors.keys()
        assert all(given[name] is tensors[name] for name in given)
        assert torch.equal(given["text_embeds"], before)
        with pytest.raises(ErasureNotInForce, match=r"no embedding for the doors .'pooled'"):
            pipe.unet(torch.zeros(1, 4, 16, 16), 10, e, added_cond_kwargs={"time_ids": given["time_ids"]})
    finally:
        noted.handle.remove()
        erasures.unload(["bank"])
        del pipe.unet._sepme_erasures


def test_guards_read_zero_at_the_pooled_door(xl):
    """Bit-identical pictures of guards while the concept's own prompt changes; also one row beside another."""
    pipe, bank = xl
    before = {prompt: latents(pipe, prompt) for prompt in ("", "watermark", "neon cat")}
    pipe.load_sepme(bank)
    try:
        erased = {prompt: latents(pipe, prompt, erased=["neon"]) for prompt in before}
        assert not torch.allclose(erased["neon cat"], before["neon cat"], atol=1e-3)
        for prompt in ("", "watermark"):
            assert torch.equal(erased[prompt], before[prompt])
        assert torch.equal(latents(pipe, "neon cat", erased=[]), before["neon cat"])
    finally:
        pipe.unload_sepme()


# --- the weights under the increments


def test_text_side_increments_follow_the_weights(unet):
    """New weights under a text-side increment: the edit is that of the new weights, not a stale one."""
    e, found = text(), increments(unet, "a")
    erase(with_bank(unet, found), {"a": 1})
    other = random_pipeline(seed=3).unet
    unet.load_state_dict(other.state_dict())
    erasures_of(unet).check([unet])
    erase(with_bank(other, found), {"a": 1})
    assert torch.equal(run(unet, e), run(other, e))


def test_an_increment_changed_in_place_is_noticed(unet):
    found = increments(unet, "a")
    erasures = Erasures([unet])
    erasures.load("bank", bank_of(found, unet), LoadOptions())
    found["a"].B.mul_(0)
    with pytest.raises(ErasureNotInForce, match="changed in place"), call_of(erasures, {"a": 1.0}):
        pass
