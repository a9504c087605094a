"""A product in halves is the product; it is taken in halves only where that was found to be faster."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zotune as zo
from zotune.estimate.batched_probes import side_by_side
from zotune.estimate.perturb import OffsetAlong
from zotune.model import matmul as gemm
from zotune.model.matmul import linear


class Quantised(torch.Tensor):
    """Weights with products of their own."""


@pytest.fixture
def halves(monkeypatch):
    """Whatever the threads and the precision are; the rows of each product that is taken."""
    rows = []
    monkeypatch.setattr(gemm, "_takes_halves", lambda *a: True)
    for name in ("mm", "addmm"):
        of = getattr(torch, name)

        def counted(*args, of=of, first=name == "addmm", **kwargs):
            rows.append(args[first].shape[0])
            return of(*args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    return rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(400, 40), (5, 81, 40), (4, 100, 40)])
def test_a_product_in_halves_is_the_product(halves, dtype, bias, shape):
    x, weight = torch.randn(shape).to(dtype), torch.randn(400, 40).to(dtype)
    b = torch.randn(400).to(dtype) if bias else None
    found = linear(x, weight, b)
    assert halves == [-(-x[..., 0].numel() // 2), x[..., 0].numel() // 2]
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert found.shape == expected.shape
    assert found.dtype == dtype
    bound = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.25}[dtype]
    assert (found.double() - expected).abs().max() <= bound


def test_passes_side_by_side_take_halves_of_layers_that_are_frozen_and_of_low_rank(halves):
    frozen, above = (nn.Linear(n, 400).requires_grad_(False) for n in (4, 400))
    tuned = nn.Linear(400, 400, bias=False)
    (u,) = zo.zo_sgd(tuned, lr=1.0, sampler=zo.low_rank(zo.rademacher)).directions()
    ends, x = side_by_side(zo.ParameterSet(tuned), [OffsetAlong(u, 0.1), OffsetAlong(u, -0.1)]), torch.randn(250, 4)
    with torch.no_grad():
        # 250 rows of a frozen layer for both ends, then 250 of each.
        ends.evaluate(lambda: above(tuned(frozen(x))))
    assert halves == [250] * 4


def test_a_layer_without_inputs_is_its_bias(halves):
    b = torch.randn(400)
    assert torch.equal(linear(torch.zeros(400, 0), torch.zeros(400, 0), b), b.expand(400, 400))


@pytest.mark.parametrize(
    ("rows", "columns", "in_halves"),
    [(399, 400, False), (400, 400, True), (799, 400, True), (800, 400, False), (300, 300, False), (1300, 1300, False)],
)
def test_halves_are_taken_from_as_many_rows_as_columns_to_twice_as_many(halves, rows, columns, in_halves):
    linear(torch.zeros(rows, 4), torch.zeros(columns, 4))
    assert bool(halves) == in_halves


@pytest.mark.parametrize(
    ("threads", "dtype", "grad", "kind", "taken"),
    [
        (2, torch.bfloat16, False, torch.Tensor, True),
        (2, torch.bfloat16, False, nn.Parameter, True),
        (1, torch.bfloat16, False, torch.Tensor, False),
        (2, torch.float32, False, torch.Tensor, False),
        (2, torch.bfloat16, True, torch.Tensor, False),
        (2, torch.bfloat16, False, Quantised, False),
    ],
)
def test_halves_are_for_two_threads_plain_bfloat16_and_no_gradient(monkeypatch, threads, dtype, grad, kind, taken):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.zeros(4, 4, dtype=dtype)
    with torch.set_grad_enabled(grad):
        assert gemm._takes_halves(x, kind(x)) == taken
