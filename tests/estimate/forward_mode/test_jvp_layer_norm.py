"""Layer normalization with tangents equals torch's own forward-mode rule, whichever of them are zero."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from zotune.estimate.forward_mode.jvp_rules import layer_norm

SHAPE, EPS = (6, 5), 1e-3


def drawn():
    torch.manual_seed(0)
    x, dx = torch.randn(2, 3, 4, *SHAPE, dtype=torch.float64)
    w, dw, b, db = torch.randn(4, *SHAPE, dtype=torch.float64)
    return (3 * x + 1, dx), (w, dw), (b, db)


def by_torch(x, weight, bias):
    def read(pair):
        primal, tangent = pair
        return primal if tangent is None else forward_ad.make_dual(primal, tangent)

    with torch.no_grad(), forward_ad.dual_level():
        y = F.layer_norm(read(x), SHAPE, read(weight), read(bias), EPS)
        return forward_ad.unpack_dual(y)


def pairs(pair):
    """A parameter that is absent, that has no tangent, and that has one."""
    return [(None, None), (pair[0], None), pair]


@pytest.mark.parametrize("moved", [True, False])
def test_it_is_torchs_rule_whatever_is_absent(moved):
    (x, dx), weight, bias = drawn()
    dx = dx if moved else None
    for w, b in product(pairs(weight), pairs(bias)):
        found, expected = layer_norm(x, dx, SHAPE, w, b, EPS), by_torch((x, dx), w, b)
        torch.testing.assert_close(found[0], expected.primal, rtol=1e-12, atol=1e-12)
        tangent = torch.zeros_like(x) if expected.tangent is None else expected.tangent
        torch.testing.assert_close(found[1], tangent, rtol=1e-12, atol=1e-12)


def test_the_tangent_is_the_limit_of_differences():
    (x, dx), (w, dw), (b, db) = drawn()

    def at(a):
        return F.layer_norm(x + a * dx, SHAPE, w + a * dw, b + a * db, EPS)

    difference = (at(1e-5) - at(-1e-5)) / 2e-5
    torch.testing.assert_close(layer_norm(x, dx, SHAPE, (w, dw), (b, db), EPS)[1], difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_half_precision_is_rounded_once(dtype, scale):
    """Also of a narrow row, whose 1/σ³ float16 cannot hold."""
    half = [tuple(t.to(dtype) for t in pair) for pair in drawn()]
    (x, dx), weight, bias = ((scale * half[0][0], scale * half[0][1]), *half[1:])
    found = layer_norm(x, dx, SHAPE, weight, bias, 1e-12)
    exact = [tuple(t.double() for t in pair) for pair in ((x, dx), weight, bias)]
    expected = layer_norm(*exact[0], SHAPE, *exact[1:], 1e-12)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=0.55 * torch.finfo(dtype).eps, atol=3e-4 * scale)
