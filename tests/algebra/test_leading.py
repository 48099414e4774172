"""Leading singular directions from products alone."""

import pytest
import torch

from sepme_diffusers.algebra.leading import leading_directions


def matrix_of(values, height=60, width=50):
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64)).Q for n in (height, width))
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T, left


def search(matrix, rank):
    start = torch.randn(matrix.shape[1], rank + 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return leading_directions(matrix.mm, matrix.T.mm, start, rank)


@pytest.mark.parametrize("values", [[9.0, 8.9, 8.8, 3, 2.9, 1, 1, 0.5], [1e3, 1.0, 1e-3, 1e-4], list(range(1, 51))])
def test_they_span_what_a_decomposition_gives(values):
    values = sorted(map(float, values), reverse=True)
    matrix, left = matrix_of(values)
    directions, found = search(matrix, 3)
    torch.testing.assert_close(found, torch.tensor(values[:3], dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(directions.T @ directions, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(directions @ directions.T, left[:, :3] @ left[:, :3].T, rtol=0, atol=1e-7)


def test_no_more_are_returned_than_there_are():
    directions, found = search(matrix_of([2.0, 1.0])[0], 5)
    assert directions.shape == (60, 2)
    torch.testing.assert_close(found, torch.tensor([2.0, 1.0], dtype=torch.float64))


def test_nothing_has_no_directions():
    directions, found = search(torch.zeros(60, 50, dtype=torch.float64), 2)
    assert directions.shape == (60, 0)
    assert found.tolist() == [0.0]
