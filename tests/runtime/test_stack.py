import pytest
import torch

from sepme_diffusers import Increment
from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.runtime.stack import ActiveStack, DeviceTensor, Stack


def text_side(rank, d=12):
    return Increment(torch.randn(rank, d), B=torch.randn(d, rank))


def acting(stack, rows, **settings):
    return ActiveStack(stack, stack.mask(rows), **settings)


def change(stack, rows, e):
    made = acting(stack, rows)
    return made.change(made.read(e))


def test_a_mask_of_zeros_changes_nothing_exactly():
    stack = Stack({"a": text_side(2), "b": text_side(3)})
    assert not change(stack, [{}], torch.randn(2, 5, 12)).any()


def test_what_rounding_leaves_of_a_guarded_token_is_exactly_nothing():
    """e · a = 0 in exact arithmetic, not in float32: the guard must hold to the bit, and no other token lose."""
    d = 768
    guard, concept = 30 * torch.randn(40, d), 30 * torch.randn(5, d)
    null = null_space(guard)
    a = (torch.randn(4, len(null)).double() @ null).float()
    stack = Stack({"a": Increment(a, B=torch.randn(d, 4))})
    assert (guard @ a.T).abs().max() > 0
    assert not change(stack, [{"a": 1.0}], guard[None]).any()
    seen = acting(stack, [{"a": 1.0}]).read(concept[None])
    torch.testing.assert_close(seen[0], concept.double() @ a.double().T)


def test_filling_up_does_not_change_what_is_computed():
    """A compiled graph needs a fixed width; the zeros that fill it up add nothing."""
    found, e = {"a": text_side(2), "b": text_side(3)}, torch.randn(2, 5, 12)
    tight, wide = Stack(found), Stack(found, width=16)
    assert (tight.width, wide.width) == (5, 16)
    rows = [{"a": 1.0, "b": 0.5}]
    torch.testing.assert_close(change(wide, rows, e), change(tight, rows, e))


def test_each_row_has_its_own_increments_also_with_guidance():
    stack, e = Stack({"a": text_side(2), "b": text_side(3)}), torch.randn(1, 5, 12).repeat(4, 1, 1)
    a, b = (change(stack, [{name: 1.0}], e[:1]) for name in "ab")
    torch.testing.assert_close(change(stack, [{"a": 1.0}, {"b": 1.0}], e), torch.cat([a, b, a, b]))


def test_a_batch_that_is_no_multiple_of_the_rows_is_refused():
    stack = Stack({"a": text_side(2)})
    with pytest.raises(ValueError, match="batch of 3 pictures, which is no multiple of the 2 erased sets"):
        change(stack, [{"a": 1.0}, {}], torch.randn(3, 5, 12))


def test_half_precision_factors_are_kept_as_they_are_stored():
    """A bank in float16 takes half the memory once loaded, too."""
    c = {"m": torch.randn(7, 2, dtype=torch.float16)}
    stack = Stack({"a": Increment(torch.randn(2, 12), C=c)})
    assert stack.outputs["m"].on(torch.device("cpu")).dtype == torch.float16
    made = acting(stack, [{"a": 1.0}])
    assert made.change(made.read(torch.randn(1, 5, 12)), "m").dtype == torch.float32


def test_what_else_is_loaded_leaves_no_bit_behind():
    """Thirty of sixty active: as if the other thirty had never been loaded, although more zeros are added up."""
    torch.manual_seed(0)
    found = {index: text_side(4, d=384) for index in range(60)}
    active = dict.fromkeys(range(0, 60, 2), 1.0)
    e = torch.randn(8, 16, 384)
    among_others = change(Stack(found), [active], e)
    assert torch.equal(among_others, change(Stack({index: found[index] for index in active}), [active], e))


def reading(*values, d=12):
    """A prompt for each value: four tokens, one of which has it as its first coordinate."""
    e = torch.randn(len(values), 4, d)
    e[..., 0] = 0
    e[:, 2, 0] = torch.tensor(values)
    return e


def test_a_gated_increment_acts_on_all_of_a_prompt_or_not_at_all():
    """Each prompt of a batch opens the gate for itself; what has no gate acts beside it as always."""
    first = torch.eye(12)[:1]
    gated, free = Increment(first, B=torch.ones(12, 1), gate=1.0), text_side(2)
    e, rows = reading(0.9, 1.1, -2.0), [{"gated": 1.0}]
    changed = change(Stack({"gated": gated, "free": free}), rows, e)
    assert not changed[0].any()
    torch.testing.assert_close(changed[1:], e[1:, :, :1].expand(-1, -1, 12))
    both = change(Stack({"gated": gated, "free": free}), [{"gated": 1.0, "free": 1.0}], e)
    alone = change(Stack({"free": free}), [{"free": 1.0}], e)
    torch.testing.assert_close(both, changed + alone)


def test_a_gate_looks_at_the_whole_rank_of_its_own_increment():
    """Two directions below the gate open it together; a neighbour in the stack does not."""
    pair = Increment(torch.eye(12)[:2], B=torch.ones(12, 2), gate=1.0)
    other = Increment(torch.eye(12)[2:3], B=torch.ones(12, 1), gate=1.0)
    e = torch.zeros(2, 3, 12)
    e[0, 1, :2] = 0.8
    e[1, 1, 1:3] = 0.8
    read = acting(Stack({"pair": pair, "other": other}, width=5), [{"pair": 1.0, "other": 1.0}]).read(e)
    assert read[0].any()
    assert not read[1].any()


def test_gates_are_filled_up_with_the_stack():
    """A compiled graph would be made anew for every set whose gates have another shape."""
    gated = {index: Increment(torch.randn(2, 12), B=torch.randn(12, 2), gate=1.0) for index in range(3)}
    e, rows = 3 * torch.randn(2, 5, 12), [{0: 1.0}]
    few, many = Stack({0: gated[0]}, width=16), Stack(gated, width=16)
    assert [t.shape for t in few.tensors()] == [t.shape for t in many.tensors()]
    assert torch.equal(change(few, rows, e), change(Stack({0: gated[0]}), rows, e))


def test_a_gate_is_open_at_any_strength():
    """The strength says how much is erased, the prompt whether."""
    stack = Stack({"a": Increment(torch.eye(12)[:1], B=torch.ones(12, 1), gate=1.0)})
    e = reading(1.5)
    torch.testing.assert_close(change(stack, [{"a": 0.1}], e), 0.1 * change(stack, [{"a": 1.0}], e))


def test_a_video_has_several_text_rows_for_each_picture():
    """Rows of the text come in the order of the pictures, each picture's together."""
    stack, e = Stack({"a": text_side(2)}), torch.randn(6, 5, 12)
    made = acting(stack, [{"a": 1.0}, {}])
    read = made.read(e, pictures=2)
    assert read[:3].any()
    assert not read[3:].any()


def test_a_pooled_embedding_is_edited_like_one_token():
    stack, e = Stack({"a": text_side(2)}), torch.randn(3, 12)
    made = acting(stack, [{"a": 1.0}, {}, {"a": 2.0}])
    edited = made.edited(e)
    assert edited.shape == e.shape
    assert torch.equal(edited[1], e[1])
    torch.testing.assert_close(edited, made.edited(e[:, None])[:, 0])
    torch.testing.assert_close(edited[2] - e[2], 2 * change(stack, [{"a": 1.0}], e[2:, None])[0, 0])


def test_what_an_encoder_rounds_does_not_count():
    """A share of the embedding below `least` is read as nothing; one above it in full."""
    stack, e = Stack({"a": Increment(torch.eye(12)[:1], B=torch.ones(12, 1))}), torch.zeros(1, 2, 12)
    e[0, 0], e[0, 1] = torch.eye(12)[1], torch.eye(12)[1]
    e[0, 0, 0], e[0, 1, 0] = 0.009, 0.02
    read = acting(stack, [{"a": 1.0}], least=0.01).read(e)
    assert read.flatten().tolist() == [0.0, pytest.approx(0.02)]


def test_an_increment_that_is_not_in_the_stack_is_not_passed_over():
    with pytest.raises(KeyError, match=r"b is not in this stack, which has \['a'\]"):
        Stack({"a": text_side(2)}).mask([{"a": 1.0}, {"b": 1.0}])


def test_the_record_says_which_pictures_opened_a_gate():
    """With guidance a picture has two rows, and either may open it; it stays open for the rest of the call."""
    stack = Stack({"a": Increment(torch.eye(12)[:1], B=torch.ones(12, 1), gate=1.0)})
    made = acting(stack, [{"a": 1.0}, {"a": 1.0}], pictures=2)
    made.read(reading(0.1, 0.1, 0.2, 2.0))
    made.read(reading(0.1, 0.1, 0.1, 0.1))
    assert made.opened.on(torch.device("cpu")).flatten().tolist() == [False, True]


def test_a_tensor_is_copied_to_another_device_once():
    held = DeviceTensor(torch.randn(3))
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert held.on(cpu) is held.on(cpu)
    assert held.on(meta) is held.on(meta)
    assert len(held.copies()) == 2
