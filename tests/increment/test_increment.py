import peft
import pytest
import torch

from sepme_diffusers import Increment
from sepme_diffusers.algebra.subspace import leakage
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.leakage import leakage as leakage_of_prompts
from sepme_diffusers.increment.peft_form import from_lora, to_lora


def per_module(rank=3):
    torch.manual_seed(0)
    return Increment(torch.randn(rank, 6), C={"x.to_k": torch.randn(4, rank), "x.to_v": torch.randn(5, rank)})


def test_text_side_edits_the_embedding_that_every_module_sees():
    """(e + (e Aᵀ) Bᵀ) Wᵀ = e (W + ΔW)ᵀ for every module: one B serves any base."""
    torch.manual_seed(0)
    increment = Increment(torch.randn(3, 6), B=torch.randn(6, 3))
    weights = {"to_k": torch.randn(4, 6), "to_v": torch.randn(9, 6)}
    e = torch.randn(7, 6)
    edited = e + (e @ increment.A.T) @ increment.B.T
    for name, delta in increment.delta_weights(weights).items():
        torch.testing.assert_close(edited @ weights[name].T, e @ (weights[name] + delta).T)


def test_expansion_is_the_same_increment():
    torch.manual_seed(0)
    increment = Increment(torch.randn(3, 6), B=torch.randn(6, 3))
    weights = {"to_k": torch.randn(4, 6)}
    expanded = increment.expand(weights)
    assert (increment.form, expanded.form) == ("text", "module")
    assert torch.equal(expanded.delta_weights(weights)["to_k"], increment.delta_weights(weights)["to_k"])


def test_lora_round_trip_is_exact():
    increment = per_module()
    tensors, config = to_lora(increment)
    assert config.peft_type == peft.PeftType.LORA
    assert config.lora_alpha == config.r == 3
    back = from_lora(tensors)
    assert torch.equal(back.A, increment.A)
    assert all(torch.equal(back.C[name], c) for name, c in increment.C.items())


def test_text_side_must_be_expanded_before_it_is_a_lora():
    with pytest.raises(ValueError, match="expand it"):
        to_lora(Increment(torch.randn(2, 4), B=torch.randn(4, 2)))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({}, "either B .* or C"),
        ({"B": torch.ones(6, 2), "C": {"m": torch.ones(4, 2)}}, "either B .* or C"),
        ({"C": {}}, "either B .* or C"),
        ({"B": torch.ones(5, 2)}, r"cannot hold: B \(5, 2\)"),
        ({"C": {"m": torch.ones(4, 3), "n": torch.ones(4)}}, r"m \(4, 3\), n \(4,\)"),
        ({"B": torch.full((6, 2), float("inf"))}, r"NaN or Inf in \['B'\]"),
    ],
)
def test_bad_factors_are_refused(factors, message):
    with pytest.raises(ValueError, match=message):
        Increment(torch.ones(2, 6), **factors)


def test_another_base_is_refused_with_its_differences(pipe):
    weights = projection_weights(pipe.unet)
    with pytest.raises(ValueError, match=r"another base: it lacks .* unknown \['x.to_k', 'x.to_v'\]"):
        per_module().coefficients(weights)
    with pytest.raises(ValueError, match=r"width 8; these modules differ"):
        Increment(torch.ones(2, 8), B=torch.ones(8, 2)).coefficients(weights)
    with pytest.raises(ValueError, match=r"shapes \(increment, base\) differ"):
        per_module().coefficients({"x.to_k": torch.ones(4, 6), "x.to_v": torch.ones(3, 6)})


def test_foreign_loras_are_refused_with_every_bad_key():
    tensors, _ = to_lora(per_module())
    with pytest.raises(ValueError, match=r"unet.a.*unet.b"):
        from_lora({**tensors, "unet.a": torch.ones(1), "unet.b": torch.ones(1)})
    tensors["base_model.model.x.to_v.lora_A.weight"] = torch.zeros(3, 6)
    with pytest.raises(ValueError, match="share one lora_A"):
        from_lora(tensors)


def test_leakage_is_the_largest_over_tokens_and_modules():
    torch.manual_seed(0)
    weights = {"k": torch.randn(6, 8), "v": torch.randn(4, 8)}
    increment = Increment(torch.randn(2, 8), C={"k": torch.randn(6, 2), "v": torch.randn(4, 2)})
    tokens = torch.randn(3, 5, 8)
    deltas = increment.delta_weights(weights)
    each = torch.stack(
        [leakage(tokens.flatten(0, 1), deltas[name], w).view(3, 5).amax(1) for name, w in weights.items()]
    )
    torch.testing.assert_close(leakage_of_prompts(increment, tokens, weights), each.amax(0), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="takes the weights of the denoiser"):
        leakage_of_prompts(increment, tokens)


def test_leakage_of_a_text_side_increment_is_the_share_of_the_embedding():
    """No weights of a denoiser are needed; the largest over tokens and doors."""
    torch.manual_seed(0)
    pooled = Increment(torch.randn(1, 4), B=torch.randn(4, 1))
    increment = Increment(torch.randn(2, 8), B=torch.randn(8, 2), doors={"pooled": pooled})
    tokens, beside = torch.randn(6, 5, 8), torch.randn(6, 1, 4)
    moved = (tokens @ increment.A.T @ increment.B.T).norm(dim=-1) / tokens.norm(dim=-1)
    there = (beside @ pooled.A.T @ pooled.B.T).norm(dim=-1) / beside.norm(dim=-1)
    measured = leakage_of_prompts(increment, tokens, further={"pooled": beside})
    torch.testing.assert_close(measured.float(), torch.maximum(moved.amax(1), there.amax(1)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_unusual_numbers_are_refused(dtype):
    with pytest.raises(ValueError, match="floating point"):
        Increment(torch.ones(2, 8).to(dtype), B=torch.ones(8, 2))


def gated_increment():
    """Reads the first of six coordinates; its gate is at 1."""
    a, b = torch.eye(6)[:1], torch.ones(6, 1)
    return Increment(a, B=b, gate=1.0)


def tokens_reading(*values):
    """A prompt for each value: two tokens, the stronger of which has it as its first coordinate."""
    return torch.tensor([[[0.1 * value, 1, 0, 0, 0, 0], [value, 1, 0, 0, 0, 0]] for value in values])


def test_a_prompt_that_leaves_the_gate_shut_leaks_nothing():
    """What nearly opens it counts as open: other hardware may round it across."""
    weights = {"to_k": torch.eye(6)}
    leaks = leakage_of_prompts(gated_increment(), tokens_reading(0.5, 0.95, 2.0), weights)
    assert leaks[0] == 0
    assert (leaks[1:] > 0.5).all()


def test_a_gate_is_a_share_of_what_the_own_prompts_read_at_least():
    gated = gated_increment().gated(tokens_reading(3.0, 2.0, -4.0), 0.5)
    assert gated.gate == pytest.approx(1.0)
    assert gated.expand({"to_k": torch.eye(6)}).gate == gated.gate


def test_a_gate_that_every_prompt_opens_is_refused():
    with pytest.raises(ValueError, match="gate of an increment is a finite number above zero"):
        gated_increment().gated(tokens_reading(0.0, 2.0), 0.5)


def with_a_door(**changes):
    """Text-side, of width 6, with a gated increment of width 9 at a further door."""
    torch.manual_seed(0)
    pooled = Increment(torch.randn(2, 9), B=torch.randn(9, 2), gate=0.5)
    return Increment(torch.randn(3, 6), **{"B": torch.randn(6, 3), "doors": {"pooled": pooled}, **changes})


def test_what_it_does_at_further_doors_is_among_its_tensors():
    increment = with_a_door()
    assert list(increment.tensors()) == ["A", "B", "pooled.A", "pooled.B"]
    assert torch.equal(increment.tensors()["pooled.B"], increment.doors["pooled"].B)


def test_a_gate_and_an_expansion_keep_the_further_doors():
    increment = with_a_door()
    gated = increment.gated(torch.randn(2, 4, 6), 0.5)
    assert gated.doors["pooled"] is increment.doors["pooled"]
    assert gated.gate is not None
    assert increment.expand({"to_k": torch.randn(4, 6)}).doors["pooled"] is increment.doors["pooled"]


def test_a_compact_increment_is_compact_at_every_door():
    compact = with_a_door().compact()
    assert {tensor.dtype for tensor in compact.tensors().values()} == {torch.float16}
    pooled, wide = compact.doors["pooled"], with_a_door().doors["pooled"]
    torch.testing.assert_close(pooled.B.double() @ pooled.A.double(), (wide.B @ wide.A).double(), rtol=0.01, atol=0.01)
    tokens = torch.randn(4, 1, 9)
    ratio = pooled.reading(tokens) / pooled.gate * wide.gate / wide.reading(tokens)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("doors", "message"),
    [
        ({"Pooled": with_a_door(doors={})}, r"lower-case letters.*\['Pooled'\]"),
        ({"a.b": with_a_door(doors={})}, r"lower-case letters.*\['a\.b'\]"),
        ({"pooled": per_module()}, r"text-side; these are per-module: \['pooled'\]"),
        ({"pooled": with_a_door()}, r"no doors of its own; these have: \['pooled'\]"),
    ],
)
def test_unusable_doors_are_refused(doors, message):
    with pytest.raises(ValueError, match=message):
        with_a_door(doors=doors)


def test_a_door_and_a_module_do_not_share_a_name():
    modules = {"pooled.A": torch.ones(4, 3)}
    with pytest.raises(ValueError, match=r"named like modules: \['pooled\.A'\]"):
        with_a_door(B=None, C=modules)
