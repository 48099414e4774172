import pytest
import torch

from sepme_diffusers import Increment
from sepme_diffusers.hooks import Erasures, erasures_of
from sepme_diffusers.targets import text_projections


def increments(unet, names, rank=2):
    torch.manual_seed(1)
    d = unet.config.cross_attention_dim
    return {name: Increment(torch.randn(rank, d), B=torch.randn(d, rank)) for name in names}


@pytest.fixture
def unet(pipe):
    return pipe.unet


def outputs(unet, e):
    with torch.no_grad():
        return {name: module(e) for name, module in text_projections(unet).items()}


def test_active_increments_add_up_to_the_dense_edit(unet):
    """y = e (W + Σ strength ΔW)ᵀ, whatever the order they were asked for."""
    e, found = torch.randn(3, 16, 384), increments(unet, "abc")
    plain = {name: module.weight.detach().clone() for name, module in text_projections(unet).items()}
    erasures = Erasures(unet)
    erasures.load(found, unet)
    erasures.activate({"c": 0.5, "a": 1.0})
    for name, y in outputs(unet, e).items():
        dense = plain[name] + sum(
            s * found[k].delta_weights({name: plain[name]})[name] for k, s in (("a", 1), ("c", 0.5))
        )
        torch.testing.assert_close(y, e @ dense.T, rtol=1e-4, atol=1e-3)


def test_order_of_calls_leaves_no_trace(unet):
    e, erasures = torch.randn(2, 16, 384), Erasures(unet)
    erasures.load(increments(unet, "abcd"), unet)
    erasures.activate({"a": 1, "b": 1, "d": 1})
    first = outputs(unet, e)
    for strengths in ({"d": 1}, {}, {"c": 2, "a": 1}, {"d": 1, "b": 1, "a": 1}):
        erasures.activate(strengths)
    assert all(torch.equal(y, first[name]) for name, y in outputs(unet, e).items())


def test_restoring_and_removing_are_bit_exact(unet):
    e, keys = torch.randn(2, 16, 384), set(unet.state_dict())
    before = outputs(unet, e)
    erasures = Erasures(unet)
    erasures.load(increments(unet, "ab"), unet)
    assert set(unet.state_dict()) == keys
    erasures.activate({"a": 1, "b": 1})
    assert not any(torch.equal(y, before[name]) for name, y in outputs(unet, e).items())
    erasures.activate({})
    assert all(torch.equal(y, before[name]) for name, y in outputs(unet, e).items())
    erasures.activate({"a": 1})
    erasures.remove(unet)
    assert all(torch.equal(y, before[name]) for name, y in outputs(unet, e).items())
    assert erasures_of(unet) is None
    assert not any(module._forward_hooks for module in unet.modules())


def test_unknown_increment_changes_nothing(unet):
    erasures = Erasures(unet)
    erasures.load(increments(unet, "ab"), unet)
    erasures.activate({"a": 1})
    with pytest.raises(KeyError, match="'z'"):
        erasures.activate({"b": 1, "z": 1})
    assert erasures.active == {"a": 1.0}


def test_loading_is_all_or_nothing(unet):
    erasures, good = Erasures(unet), increments(unet, "a")
    with pytest.raises(ValueError, match="another base"):
        erasures.load({**good, "bad": Increment(torch.ones(1, 384), C={"x": torch.ones(1, 1)})}, unet)
    assert erasures.loaded == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_get_the_increment_in_full_precision(unet, dtype):
    e, found = torch.randn(2, 16, 384), increments(unet, "a")
    unet.to(dtype)
    before = outputs(unet, e.to(dtype))
    erasures = Erasures(unet)
    erasures.load(found, unet)
    erasures.activate({"a": 1})
    for name, y in outputs(unet, e.to(dtype)).items():
        weight = text_projections(unet)[name].weight.float()
        change = e.to(dtype).float() @ found["a"].delta_weights({name: weight})[name].T
        assert y.dtype == dtype
        torch.testing.assert_close(
            y, before[name] + change.to(dtype), rtol=1e-2, atol=1e-2 * change.abs().max().item()
        )
    erasures.activate({})
    assert all(torch.equal(y, before[name]) for name, y in outputs(unet, e.to(dtype)).items())


def test_missing_names_what_would_not_be_erased(unet):
    erasures = Erasures(unet)
    assert erasures.missing_from(unet) == []
    name, module = next(iter(text_projections(unet).items()))
    module._forward_hooks.clear()
    assert erasures.missing_from(unet) == [name]
