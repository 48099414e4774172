import pytest
import torch

from sepme_diffusers.algebra.closed_form import Sums, covariance, output_factor, reduced_rank_edit, with_gain
from sepme_diffusers.algebra.subspace import null_space


@pytest.fixture
def problem():
    torch.manual_seed(0)
    guard, concept = torch.randn(10, 40), torch.randn(25, 40)
    return {"guard": guard, "concept": concept, "change": torch.randn(25, 40), "null": null_space(guard)}


def objective(a, b, problem, ridge, soft=None, weight=0.0, metric=None):
    """What `reduced_rank_edit` says it minimises, written out."""
    null, n = problem["null"], len(problem["concept"])
    metric = torch.eye(40, dtype=torch.float64) if metric is None else metric
    operator = (b @ a).T  # e -> e operator
    error = problem["concept"].double() @ operator - problem["change"].double()
    scale = (problem["concept"].double() @ null.T).pow(2).sum() / n / len(null)
    penalty = ridge * scale * torch.eye(40, dtype=torch.float64) + (0 if soft is None else weight * soft)
    return (error @ metric @ error.T).trace() / n + (operator.T @ penalty @ operator @ metric).trace()


def test_guarded_tokens_are_not_moved(problem):
    a, _ = reduced_rank_edit(problem["concept"], problem["change"], problem["null"], rank=8)
    assert (problem["guard"].double() @ a.T).abs().max() < 1e-5


def test_full_rank_is_ridge_regression(problem):
    """At full rank the formula must agree with solving the normal equations."""
    null = problem["null"]
    a, b = reduced_rank_edit(problem["concept"], problem["change"], null, rank=30, ridge=1e-3)
    inside = problem["concept"].double() @ null.T
    gram = inside.T @ inside / 25
    gram += 1e-3 * gram.trace() / len(null) * torch.eye(len(null), dtype=torch.float64)
    expected = null.T @ torch.linalg.solve(gram, inside.T @ problem["change"].double() / 25)
    torch.testing.assert_close((b @ a).T, expected)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_no_other_edit_of_that_rank_is_better(problem, rank):
    """Eckart-Young: perturbing the factors anywhere in the null space never lowers the objective."""
    soft, w = covariance(torch.randn(100, 40)), torch.randn(60, 40).double()
    metric = w.T @ w
    factor = output_factor([w])
    torch.testing.assert_close(factor @ factor.T, metric)
    null = problem["null"]
    penalty = 0.5 * null @ soft @ null.T
    a, b = reduced_rank_edit(problem["concept"], problem["change"], null, rank, penalty, 1e-3, factor)
    best = objective(a, b, problem, 1e-3, soft, 0.5, metric)
    for scale in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(10):
            other_a = a + scale * a.norm() / 20 * torch.randn(rank, len(null)).double() @ null
            other_b = b + scale * b.norm() / 20 * torch.randn_like(b)
            assert objective(other_a, other_b, problem, 1e-3, soft, 0.5, metric) >= best * (1 - 1e-9)


def test_soft_guards_are_moved_less(problem):
    regular = torch.randn(4, 40)
    moved, null = [], problem["null"]
    for weight in (0.0, 10.0):
        penalty = weight * null @ covariance(regular) @ null.T
        a, b = reduced_rank_edit(problem["concept"], problem["change"], null, 8, penalty)
        moved.append((regular.double() @ a.T @ b.T).norm())
    assert moved[1] < 0.3 * moved[0]


def test_rank_never_exceeds_the_null_space(problem):
    a, b = reduced_rank_edit(problem["concept"], problem["change"], problem["null"][:5], rank=50)
    assert a.shape == (5, 40)
    assert b.shape == (40, 5)


def test_wrong_shapes_are_refused(problem):
    with pytest.raises(ValueError, match="must agree"):
        reduced_rank_edit(problem["concept"], problem["change"][:3], problem["null"], rank=2)


@pytest.mark.parametrize("factor", [False, True], ids=["plain", "felt by outputs"])
@pytest.mark.parametrize("rank", [1, 5])
def test_a_search_for_the_leading_directions_finds_what_a_whole_decomposition_does(rank, factor, monkeypatch):
    torch.manual_seed(0)
    concept, change, null = torch.randn(150, 120), torch.randn(150, 120), null_space(torch.randn(20, 120))
    outputs = output_factor([torch.randn(90, 120)]) if factor else None
    penalty = torch.eye(100, dtype=torch.float64)
    found = reduced_rank_edit(concept, change, null, rank, penalty, output_factor=outputs)
    monkeypatch.setattr("sepme_diffusers.algebra.closed_form._FEW", 1000)
    whole = reduced_rank_edit(concept, change, null, rank, penalty, output_factor=outputs)
    assert len(found[0]) == len(whole[0]) == rank
    torch.testing.assert_close(found[1] @ found[0], whole[1] @ whole[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [False, True], ids=["plain", "felt by outputs"])
@pytest.mark.parametrize("rank", [1, 30])
def test_sums_over_the_rows_are_all_that_a_solve_needs_of_them(rank, factor):
    torch.manual_seed(0)
    concept, change, null = torch.randn(300, 60), torch.randn(300, 60), null_space(torch.randn(20, 60))
    inside = concept.double() @ null.T
    settings = {"penalty": torch.eye(40, dtype=torch.float64), "inside": inside}
    settings["output_factor"] = output_factor([torch.randn(90, 60)]) if factor else None
    a, b = reduced_rank_edit(concept, change, null, rank, **settings)
    from_sums = reduced_rank_edit(concept, change, null, rank, **settings, sums=Sums.of(inside, change))
    assert len(from_sums[0]) == len(a) == rank
    torch.testing.assert_close(from_sums[1] @ from_sums[0], b @ a, rtol=1e-9, atol=1e-12)


def test_no_direction_is_kept_that_does_nothing(problem):
    """One token's change has rank one, whatever rank is allowed."""
    a, _ = reduced_rank_edit(problem["concept"][:1], problem["change"][:1], problem["null"], rank=8)
    assert len(a) == 1


def test_no_wanted_change_is_refused(problem):
    with pytest.raises(ValueError, match="wanted change is zero"):
        reduced_rank_edit(problem["concept"], torch.zeros(25, 40), problem["null"], rank=2)


@pytest.mark.parametrize("gain", [1.0, 0.6])
def test_the_gain_is_the_share_of_the_wanted_change_that_is_given(problem, gain):
    """Soft guards shrink an edit; scaled back, it gives what was asked along the wanted change, and reads the same."""
    factor = torch.randn(40, 40, dtype=torch.float64)
    asked = (problem["concept"], problem["change"])
    shrunk = reduced_rank_edit(*asked, problem["null"], 4, penalty=9 * torch.eye(30), output_factor=factor)
    a, b = with_gain(shrunk, *asked, gain, factor)
    assert torch.equal(a, shrunk[0])
    moved, wanted = (x.double() @ factor for x in (problem["concept"].double() @ a.T @ b.T, problem["change"]))
    assert float((moved * wanted).sum() / wanted.square().sum()) == pytest.approx(gain)


def test_no_gain_makes_up_for_an_edit_in_the_wrong_direction(problem):
    a, b = reduced_rank_edit(problem["concept"], problem["change"], problem["null"], 4)
    with pytest.raises(ValueError, match="no scale makes that 1"):
        with_gain((a, -b), problem["concept"], problem["change"], 1.0)
