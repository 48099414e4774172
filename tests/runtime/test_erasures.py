import copy
import pickle
import threading

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from sepme_diffusers import BaseModel, Concept, ConceptBank, Entry, ErasureNotInForce, Increment, SepMEConfig
from sepme_diffusers.doors.linears import projection_shapes, text_projections
from sepme_diffusers.runtime.erasures import Erasures, erasures_of
from small import random_pipeline


def increments(unet, names, rank=2, form="text", seed=1):
    torch.manual_seed(seed)
    shapes, made = projection_shapes(unet), {}
    d = unet.config.cross_attention_dim
    for name in names:
        b = torch.randn(d, rank)
        c = {module: torch.randn(d_out, rank) for module, (d_out, _) in shapes.items()}
        made[name] = Increment(torch.randn(rank, d), **({"B": b} if form == "text" else {"C": c}))
    return made


def bank_of(found, unet):
    shapes = {name: (d_out, 1.0) for name, (d_out, _) in projection_shapes(unet).items()}
    base = BaseModel("base", unet.config.cross_attention_dim, 16, shapes)
    return ConceptBank(base, {name: Entry(Concept(name), one, SepMEConfig(), ("",)) for name, one in found.items()})


def with_bank(unet, found):
    erasures = Erasures(unet)
    erasures.load("bank", bank_of(found, unet), {})
    return erasures


def keyed(strengths):
    return {("bank", name): strength for name, strength in strengths.items()}


@pytest.fixture
def unet(pipe):
    return pipe.unet


def outputs(unet, e):
    with torch.no_grad():
        return {name: module(e) for name, module in text_projections(unet).items()}


def same(some, others):
    return all(torch.equal(y, others[name]) for name, y in some.items())


def run(unet, rows=1):
    torch.manual_seed(0)
    with torch.no_grad():
        return unet(torch.randn(rows, 4, 8, 8), 10, torch.randn(1, 16, 384).repeat(rows, 1, 1)).sample


@pytest.mark.parametrize("forms", [("text", "text"), ("module", "module"), ("text", "module")])
def test_active_increments_add_up_to_the_dense_edit(unet, forms):
    """y = e (W + Σ strength ΔW)ᵀ, whatever their form: a per-module increment reads the unedited e."""
    e = torch.randn(3, 16, 384)
    found = increments(unet, "ab", form=forms[0]) | increments(unet, "c", form=forms[1], seed=2)
    plain = {name: module.weight.detach().clone() for name, module in text_projections(unet).items()}
    with_bank(unet, found).activate(keyed({"c": 0.5, "a": 1.0}))
    for name, y in outputs(unet, e).items():
        dense = plain[name] + sum(
            s * found[k].delta_weights({name: plain[name]} if found[k].B is not None else plain)[name]
            for k, s in (("a", 1), ("c", 0.5))
        )
        torch.testing.assert_close(y, e @ dense.T, rtol=1e-4, atol=1e-3)


def test_order_of_calls_leaves_no_trace(unet):
    e, erasures = torch.randn(2, 16, 384), with_bank(unet, increments(unet, "abcd"))
    erasures.activate(keyed({"a": 1, "b": 1, "d": 1}))
    first = outputs(unet, e)
    for strengths in ({"d": 1}, {}, {"c": 2, "a": 1}, {"d": 1, "b": 1, "a": 1}):
        erasures.activate(keyed(strengths))
    assert same(outputs(unet, e), first)


def test_banks_add_up_in_the_order_of_their_names_not_of_loading(unet):
    e, made = torch.randn(2, 16, 384), []
    some, more = (bank_of(increments(unet, names), unet) for names in ("ab", "cd"))
    for order in (("x", some), ("y", more)), (("y", more), ("x", some)):
        erasures = Erasures(unet)
        for name, bank in order:
            erasures.load(name, bank, {})
        erasures.activate({("y", "c"): 1.0, ("x", "a"): 1.0, ("x", "b"): 1.0})
        made.append(outputs(unet, e))
        erasures.remove(unet)
    assert same(*made)


@pytest.mark.parametrize("form", ["text", "module"])
def test_restoring_and_removing_are_bit_exact(unet, form):
    e, keys = torch.randn(2, 16, 384), set(unet.state_dict())
    before = outputs(unet, e)
    erasures = with_bank(unet, increments(unet, "ab", form=form))
    assert set(unet.state_dict()) == keys
    erasures.activate(keyed({"a": 1, "b": 1}))
    assert not any(torch.equal(y, before[name]) for name, y in outputs(unet, e).items())
    erasures.activate({})
    assert same(outputs(unet, e), before)
    erasures.activate(keyed({"a": 1}))
    erasures.remove(unet)
    assert same(outputs(unet, e), before)
    assert erasures_of(unet) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_a_row_that_erases_nothing_is_bit_identical_beside_one_that_does(unet):
    e = torch.randn(1, 16, 384).repeat(2, 1, 1)
    before, erasures = outputs(unet, e), with_bank(unet, increments(unet, "ab"))
    with erasures.temporarily([keyed({"a": 1.0}), {}]):
        edited = outputs(unet, e)
    for name, y in edited.items():
        assert torch.equal(y[1], before[name][1])
        assert not torch.equal(y[0], before[name][0])


def test_few_of_very_many_act_as_if_the_others_were_not_loaded(unet):
    """Beyond the embedding's width only the active increments are gathered; the result is that of a small bank."""
    e, many = torch.randn(2, 16, 384), increments(unet, [f"c{i}" for i in range(300)])
    erasures = with_bank(unet, many)
    asked = {"c7": 1.0, "c250": 0.5}
    erasures.activate(keyed(asked))
    gathered = outputs(unet, e)
    erasures.remove(unet)
    with_bank(unet, {name: many[name] for name in asked}).activate(keyed(asked))
    for name, y in outputs(unet, e).items():
        torch.testing.assert_close(y, gathered[name], rtol=1e-5, atol=1e-4)


def test_unknown_increment_changes_nothing(unet):
    erasures = with_bank(unet, increments(unet, "ab"))
    erasures.activate(keyed({"a": 1}))
    with pytest.raises(KeyError, match="'z'"):
        erasures.activate(keyed({"b": 1, "z": 1}))
    assert erasures.active == keyed({"a": 1.0})


def test_a_bank_that_cannot_be_loaded_leaves_the_others_in_force(unet):
    e, erasures = torch.randn(2, 16, 384), with_bank(unet, increments(unet, "ab"))
    erasures.activate(keyed({"a": 1}))
    before = outputs(unet, e)
    with pytest.raises(KeyError, match="ghost"):
        erasures.load("more", bank_of(increments(unet, "c"), unet), keyed({"a": 1}) | {("more", "ghost"): 1.0})
    assert list(erasures.banks) == ["bank"]
    assert same(outputs(unet, e), before)


def test_the_edit_is_computed_once_a_pass_and_never_stale(unet):
    """What is remembered within a pass is known by tensor and version: new content or another set is seen at once."""
    erasures, reads = with_bank(unet, increments(unet, "ab")), []
    erasures.activate(keyed({"a": 1}))
    for name, module in text_projections(unet).items():
        module.register_forward_hook(lambda module, inputs, output, name=name: reads.append(inputs[0]))
    run(unet)
    assert len({id(read) for read in reads}) == 1
    assert len(reads) == len(text_projections(unet))
    e = torch.randn(1, 16, 384)
    erasures.begin_pass()
    first = outputs(unet, e)
    e.mul_(2)
    second = outputs(unet, e)
    erasures.activate(keyed({"b": 1}))
    third = outputs(unet, e)
    erasures.end_pass(unet)
    assert same(third, outputs(unet, e))
    erasures.activate(keyed({"a": 1}))
    assert same(second, outputs(unet, e))
    assert not same(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["text", "module"])
def test_low_precision_models_get_the_increment_in_full_precision(unet, dtype, form):
    e, found = torch.randn(2, 16, 384).to(dtype), increments(unet, "a", form=form)
    unet.to(dtype)
    before = outputs(unet, e)
    weights = {name: module.weight.float() for name, module in text_projections(unet).items()}
    changes = {name: e.float() @ delta.T for name, delta in found["a"].delta_weights(weights).items()}
    erasures = with_bank(unet, found)
    erasures.activate(keyed({"a": 1}))
    for name, y in outputs(unet, e).items():
        assert y.dtype == dtype
        error = (y.float() - before[name].float() - changes[name]).norm() / changes[name].norm()
        assert error < torch.finfo(dtype).eps
    erasures.activate({})
    assert same(outputs(unet, e), before)


def test_a_set_for_one_thread_does_not_reach_another(unet):
    e, erasures = torch.randn(2, 16, 384), with_bank(unet, increments(unet, "ab"))
    expected = {}
    for name in "ab":
        erasures.activate(keyed({name: 1}))
        expected[name] = outputs(unet, e)
    erasures.activate({})
    plain, barrier, wrong = outputs(unet, e), threading.Barrier(3), []

    def work(name):
        with erasures.temporarily([keyed({name: 1.0})]):
            barrier.wait()
            wrong.extend(name for _ in range(5) if not same(outputs(unet, e), expected[name]))
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    barrier.wait()
    assert same(outputs(unet, e), plain)
    barrier.wait()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_sets_nest_and_the_outer_one_comes_back(unet):
    e, erasures = torch.randn(2, 16, 384), with_bank(unet, increments(unet, "ab"))
    with erasures.temporarily([keyed({"a": 1.0})]):
        outer = outputs(unet, e)
        with erasures.temporarily([keyed({"b": 1.0})]):
            assert not same(outputs(unet, e), outer)
        assert same(outputs(unet, e), outer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_a_copied_denoiser_erases_by_itself(unet, duplicate):
    erasures = with_bank(unet, increments(unet, "a") | increments(unet, "b", form="module"))
    plain = run(unet)
    erasures.activate(keyed({"a": 1, "b": 1}))
    expected, twin = run(unet), duplicate(unet)
    erasures.activate({})
    assert torch.equal(run(twin), expected)
    assert torch.equal(run(unet), plain)
    erasures_of(twin).activate({})
    assert torch.equal(run(twin), plain)
    erasures_of(twin).remove(twin)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())


def test_missing_names_what_would_not_be_erased(unet):
    erasures = with_bank(unet, increments(unet, "a"))
    assert erasures.missing_from(unet) == []
    name, module = next(iter(text_projections(unet).items()))
    module._forward_pre_hooks.clear()
    assert erasures.missing_from(unet) == [name]
    with pytest.raises(ErasureNotInForce, match=name):
        erasures.check(unet)


class ReadsForItself(AttnProcessor):
    """A processor that multiplies by to_k's weight instead of calling to_k."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        keys = encoder_hidden_states @ attn.to_k.weight.T
        return attn.to_out[0](attn.to_q(hidden_states) * keys.mean(dim=1, keepdim=True))


def test_a_pass_that_bypasses_a_projection_is_refused_by_the_denoiser_itself(unet):
    """Also for a plain pipeline that shares the UNet; and also when the processor comes between two passes."""
    erasures = with_bank(unet, increments(unet, "a"))
    erasures.activate(keyed({"a": 1}))
    run(unet)
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attention.set_processor(ReadsForItself())
    with pytest.raises(ErasureNotInForce, match=r"attn2\.to_k.*bypassed"):
        run(unet)
    erasures.activate({})
    run(unet)


def test_other_weights_under_a_per_module_increment_are_noticed(unet):
    erasures = with_bank(unet, increments(unet, "a", form="module"))
    erasures.check(unet)
    with torch.no_grad():
        for module in text_projections(unet).values():
            module.weight.data *= 1.2  # a fused adapter: the increment still fits
    erasures.check(unet)
    unet.load_state_dict(random_pipeline(seed=3).unet.state_dict())
    with pytest.raises(ErasureNotInForce, match="no longer those that the per-module increments were loaded on"):
        erasures.check(unet)


def test_text_side_increments_follow_the_weights(unet):
    """New weights under a text-side increment: the edit is that of the new weights, not a stale one."""
    e, found = torch.randn(2, 16, 384), increments(unet, "a")
    erasures = with_bank(unet, found)
    erasures.activate(keyed({"a": 1}))
    other = random_pipeline(seed=3).unet
    unet.load_state_dict(other.state_dict())
    erasures.check(unet)
    with_bank(other, found).activate(keyed({"a": 1}))
    assert same(outputs(unet, e), outputs(other, e))
