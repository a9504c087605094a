"""ZO-MOPI where the momentum has fewer directions than it looks for: no weight becomes NaN, and noise does not move."""

from functools import partial

import pytest
import torch
from torch import nn

import zotune as zo
from zotune.apply.subspace import Basis
from zotune.directions.samplers import Subspace
from zotune.methods.mopi import power_iteration


@pytest.mark.parametrize("rank", [1, 2])
def test_a_momentum_of_low_rank_moves_along_its_own_directions_alone(rank):
    generator = torch.Generator().manual_seed(rank)
    m = partial(torch.randn, dtype=torch.float64, generator=generator)(6, rank) @ torch.eye(rank, 7).double()
    basis = Basis(5, Subspace(3, torch.eye(6), None), lambda seed: Subspace(seed, torch.eye(6), None))
    state = {}
    for _ in range(3):
        step, state = power_iteration(m, state, basis, beta=0.0, top=4)
        right = state["right"]
        assert torch.allclose(right.t() @ right, torch.eye(4, dtype=torch.float64), atol=1e-8)
        assert torch.linalg.matrix_rank(step, atol=1e-6) == rank
        assert torch.linalg.svdvals(step)[0] < rank**0.5 + 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_directions_of_signs_that_make_a_singular_momentum_leave_weights_finite(beta):
    for seed in range(4):
        model = nn.Linear(2, 2, bias=False)
        opt = zo.mopi(model, lr=0.01, beta=beta, sampler=zo.rademacher, num_queries=1, seed=seed)
        for _ in range(4):
            opt.step(lambda model=model: model.weight.square().sum())
        assert model.weight.isfinite().all()
        assert not opt.num_skipped
