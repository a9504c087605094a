"""Attention with tangents equals torch's own forward-mode rule, and finite differences, whatever the masks."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zotune.estimate.forward_mode.jvp_rules import attention
from zotune.system import limits

BATCH, HEADS, LENGTH, KEYS, WIDTH = 5, 6, 7, 9, 4


def drawn(dtype=torch.float64, groups=HEADS, keys=KEYS):
    torch.manual_seed(0)
    shapes = [(BATCH, HEADS, LENGTH, WIDTH), (BATCH, groups, keys, WIDTH), (BATCH, groups, keys, WIDTH + 1)]
    return [tuple(torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes) for _ in range(2)]


def by_torch(primals, tangents, mask, is_causal, scale):
    options = {"attn_mask": mask, "is_causal": is_causal, "scale": scale, "enable_gqa": True}
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        return forward_ad.unpack_dual(F.scaled_dot_product_attention(*duals, **options))


def boolean(*shape):
    torch.manual_seed(1)
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "pairs": (boolean(LENGTH, KEYS), False),
    "examples": (boolean(BATCH, 1, LENGTH, KEYS), False),
    "heads": (boolean(1, HEADS, LENGTH, KEYS), False),
    "numbers": (torch.randn(BATCH, 1, LENGTH, KEYS, dtype=torch.float64), False),
    "minus infinity": (
        torch.zeros(LENGTH, KEYS, dtype=torch.float64).masked_fill(~boolean(LENGTH, KEYS), -torch.inf),
        False,
    ),
}


@pytest.mark.parametrize("groups", [HEADS, 3, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scores", [1 << 20, 2 * HEADS * LENGTH * KEYS, 1], ids=["all", "two examples", "each alone"])
def test_it_is_torchs_rule_whatever_the_mask_the_groups_and_the_pieces(monkeypatch, groups, scale, mask, scores):
    monkeypatch.setattr(limits, "SCORE_ELEMENTS", scores)
    (primals, tangents), (tensor, is_causal) = drawn(groups=groups), MASKS[mask]
    found = attention(primals, tangents, tensor, is_causal=is_causal, scale=scale)
    expected = by_torch(primals, tangents, tensor, is_causal, scale)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_tangent_is_the_limit_of_differences():
    primals, tangents = drawn()

    def at(a):
        moved = [p + a * t for p, t in zip(primals, tangents, strict=True)]
        return F.scaled_dot_product_attention(*moved, is_causal=True)

    difference = (at(1e-5) - at(-1e-5)) / 2e-5
    torch.testing.assert_close(attention(primals, tangents, is_causal=True)[1], difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", ["boolean", "numbers"])
def test_a_position_that_sees_nothing_has_zeros_and_spoils_no_other(form):
    primals, tangents = drawn()
    seen = boolean(BATCH, 1, LENGTH, KEYS)
    seen[1, 0, 2] = False
    mask = seen if form == "boolean" else torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    out, tangent = attention(primals, tangents, mask)
    assert not out[1, :, 2].any() and not tangent[1, :, 2].any()
    expected = by_torch(primals, tangents, mask, False, None)
    torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-12)
    assert tangent.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_that_of_single_precision_rounded_once(dtype):
    primals, tangents = drawn(dtype)
    wide = [tuple(t.float() for t in triple) for triple in (primals, tangents)]
    for one, other in zip(attention(primals, tangents), attention(*wide), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other.to(dtype), rtol=0, atol=0)
