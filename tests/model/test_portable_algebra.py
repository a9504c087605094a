"""Products and orthonormal columns: as accurate as double precision wants them, and the same in any order of sums."""

import pytest
import torch

from zotune.model.portable_algebra import frobenius, normalised_columns, orthonormal, portable_matmul


@pytest.mark.parametrize(("m", "k", "n"), [(3, 1, 4), (5, 64, 7), (8, 4099, 3)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_a_product_does_not_depend_on_the_order_of_its_sums(m, k, n, scale):
    torch.manual_seed(0)
    a, b = torch.randn(m, k, dtype=torch.float64) * scale, torch.randn(k, n, dtype=torch.float64)
    found = portable_matmul(a, b)
    for order in (torch.randperm(k), torch.arange(k).flip(0)):
        assert torch.equal(portable_matmul(a[:, order], b[order]), found)
    loops = torch.zeros(m, n, dtype=torch.float64)
    assert (found - (a @ b)).abs().max() <= 1e-9 * scale * max(1, k**0.5) and loops.shape == found.shape


def test_orthonormal_columns_are_those_of_qr_with_a_positive_diagonal():
    torch.manual_seed(0)
    x = torch.randn(50, 12, dtype=torch.float64)
    q, r = torch.linalg.qr(x)
    assert torch.allclose(orthonormal(x), q * r.diagonal().sign(), atol=1e-10)
    square = torch.randn(40, 40)
    q = orthonormal(square)
    assert torch.allclose(q.t() @ q, torch.eye(40, dtype=torch.float64), atol=1e-8)


def test_lengths_are_those_of_torch():
    x = torch.randn(9, 4)
    x[:, 2] = 0
    assert frobenius(x) == pytest.approx(float(x.double().norm()), rel=1e-12)
    assert torch.allclose(normalised_columns(x).norm(dim=0), torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
