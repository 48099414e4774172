import pytest
import torch

from sepme_diffusers import Increment
from sepme_diffusers.stack import SHARED, Acting, Placed, Stack
from sepme_diffusers.subspace import null_space


def text_side(rank, d=12):
    return Increment(torch.randn(rank, d), B=torch.randn(d, rank))


class Active:
    def __init__(self, stack, rows):
        self.acting = Acting(stack, Placed(stack.mask(rows)))

    def change(self, e, name=SHARED):
        return self.acting.change(self.acting.read(e), name)


acting = Active


def test_a_mask_of_zeros_changes_nothing_exactly():
    stack = Stack({"a": text_side(2), "b": text_side(3)})
    assert not acting(stack, [{}]).change(torch.randn(2, 5, 12)).any()


def test_what_rounding_leaves_of_a_guarded_token_is_exactly_nothing():
    """e · a = 0 in exact arithmetic, not in float32: the guard must hold to the bit, and no other token lose."""
    d = 768
    guard, concept = 30 * torch.randn(40, d), 30 * torch.randn(5, d)
    null = null_space(guard)
    a = (torch.randn(4, len(null)).double() @ null).float()
    stack = Stack({"a": Increment(a, B=torch.randn(d, 4))})
    assert (guard @ a.T).abs().max() > 0
    assert not acting(stack, [{"a": 1.0}]).change(guard[None]).any()
    seen = acting(stack, [{"a": 1.0}]).acting.read(concept[None])
    torch.testing.assert_close(seen[0], concept @ a.T, rtol=1e-5, atol=0)


def test_filling_up_does_not_change_what_is_computed():
    """A compiled graph needs a fixed width; the zeros that fill it up add nothing."""
    found, e = {"a": text_side(2), "b": text_side(3)}, torch.randn(2, 5, 12)
    tight, wide = Stack(found), Stack(found, width=16)
    assert (tight.width, wide.width) == (5, 16)
    rows = [{"a": 1.0, "b": 0.5}]
    torch.testing.assert_close(acting(wide, rows).change(e), acting(tight, rows).change(e))


def test_each_row_has_its_own_increments_also_with_guidance():
    stack, e = Stack({"a": text_side(2), "b": text_side(3)}), torch.randn(1, 5, 12).repeat(4, 1, 1)
    a, b = (acting(stack, [{name: 1.0}]).change(e[:1]) for name in "ab")
    torch.testing.assert_close(acting(stack, [{"a": 1.0}, {"b": 1.0}]).change(e), torch.cat([a, b, a, b]))


def test_a_batch_that_is_no_multiple_of_the_rows_is_refused():
    stack = Stack({"a": text_side(2)})
    with pytest.raises(ValueError, match="batch of 3, which is no multiple of the 2 erased sets"):
        acting(stack, [{"a": 1.0}, {}]).change(torch.randn(3, 5, 12))


def test_half_precision_factors_are_kept_as_they_are_stored():
    """A bank in float16 takes half the memory once loaded, too."""
    c = {"m": torch.randn(7, 2, dtype=torch.float16)}
    stack = Stack({"a": Increment(torch.randn(2, 12), C=c)})
    assert stack.outputs["m"].on(torch.device("cpu")).dtype == torch.float16
    assert acting(stack, [{"a": 1.0}]).change(torch.randn(1, 5, 12), "m").dtype == torch.float32
