"""Principal components found by passes are the leading eigenvectors of what a tensor multiplies."""

import pytest
import torch
from torch import nn

import zotune as zo
from zotune.directions.principal import LeadingVectors


class GainPlusOne(nn.Module):
    """A norm as Gemma's: y = (1 + g) x / rms(x)."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n))

    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() * (1 + self.weight)


class GainPlusOneRMSNorm(GainPlusOne):
    """The same, by a name that says that it is a norm."""


class Conv1D(nn.Module):
    """A linear layer that holds its weight as (inputs, outputs), as GPT-2's."""

    def __init__(self, n, m):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, m))

    def forward(self, x):
        return x @ self.weight


def leading(x, rank):
    """The leading eigenvectors of Σ x xᵀ in float64."""
    x = x.reshape(-1, x.shape[-1]).double()
    return torch.linalg.eigh(x.t() @ x).eigenvectors[:, -rank:]


def same_span(found, expected):
    q = torch.linalg.qr(found.double()).Q
    return float((expected - q @ (q.t() @ expected)).norm()) < 1e-3 and found.shape == expected.shape


def skewed(rows, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, n, generator=generator) * 0.5 ** torch.arange(n) + torch.linspace(1, 0, n)


def test_linear_layers_and_norms_get_the_components_of_what_they_multiply():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 20), nn.LayerNorm(20), GainPlusOneRMSNorm(20), Conv1D(20, 16))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(20))
        model[1].bias.copy_(torch.randn(20))
    x = skewed(200, 24)
    found = zo.principal_subspaces(model, lambda: model(x), 3, passes=12)
    with torch.no_grad():
        first = model[0](x)
        second = nn.functional.layer_norm(first, (20,))
        third = model[1](first)
        third_normed = third / third.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        fourth = model[2](third)
    assert same_span(found["0.weight"].right, leading(x, 3))
    assert same_span(found["1.weight"].left, leading(second, 3))
    assert same_span(found["2.weight"].left, leading(third_normed, 3))
    assert same_span(found["3.weight"].left, leading(fourth, 3))
    assert found.keys() == {"0.weight", "1.weight", "2.weight", "3.weight"}
    assert all((s.left is None) != (s.right is None) for s in found.values())


def test_only_rows_that_count_count():
    model, x = nn.Linear(12, 4), skewed(60, 12)
    found = zo.principal_subspaces(model, lambda: model(x), 2, passes=9, rows=lambda module, values: values[:20])
    assert same_span(found["weight"].right, leading(x[:20], 2))


def test_tensors_of_other_readers_and_small_ones_get_none():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head, self.small = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False), nn.Linear(6, 2)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids)), self.small(self.embedding(ids))

    model = Tied()
    assert zo.principal_subspaces(model, lambda: model(torch.arange(9)), 2).keys() == {"small.weight"}
    assert not zo.principal_subspaces(model, lambda: model(torch.arange(9)), 6)


def test_what_no_pass_reads_is_named():
    model = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 3)})
    with pytest.raises(zo.UsageError, match=r"did not read 'b\.weight'"):
        zo.principal_subspaces(model, lambda: model["a"](torch.ones(4, 5)), 2)
    with pytest.raises(zo.UsageError, match="rank=0"):
        zo.principal_subspaces(model, lambda: None, 0)
    assert not any(m._forward_hooks for m in model.modules())


def test_leading_vectors_are_orthonormal_and_in_order():
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 5, 2, 0.1, 9, 0.5])
    one = LeadingVectors(6, 3, "cpu")
    for _ in range(20):
        one.add(x)
        one.turn()
    assert torch.allclose(one.found.t() @ one.found, torch.eye(3), atol=1e-5)
    lengths = (x @ one.found).norm(dim=0)
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
