"""The estimator that is captured as a CUDA graph: what it is without a GPU (on one: test_gpu.py), what it refuses."""

import pytest
import torch
from torch import nn

import zotune as zo
from zotune.estimate.cuda_graph import CUDAGraphDifference


def made():
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(8, 5), torch.randint(0, 3, (8,))
    return model, x, y, lambda x, y: nn.functional.cross_entropy(model(x), y, reduction="none")


def test_without_a_gpu_it_is_the_central_difference_of_the_batch_that_it_was_given():
    (model, x, y, losses), (other, _, _, others) = made(), made()
    probe = CUDAGraphDifference(losses, x, y, mu=1e-2)
    graphed = zo.ZerothOrder(model, lr=0.1, estimator=probe, num_queries=3)
    plain = zo.zo_sgd(other, lr=0.1, mu=1e-2, num_queries=3)
    for _ in range(5):
        x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
        assert graphed.step(probe.on(x, y)) == plain.step(zo.batched(others, x, y))
    assert torch.equal(model.weight, other.weight)
    assert graphed.num_forwards == plain.num_forwards == 30


def test_another_shape_dtype_or_objective_is_refused_with_what_to_do():
    model, x, y, losses = made()
    probe = CUDAGraphDifference(losses, x, y, mu=1e-2)
    opt = zo.ZerothOrder(model, lr=0.1, estimator=probe)
    for wrong in ((x[:4], y[:4]), (x.double(), y), (x,)):
        with pytest.raises(zo.UsageError, match=r"pad the batch"):
            probe.on(*wrong)
    with pytest.raises(zo.UsageError, match=r"probe\.on"):
        opt.step(lambda: losses(x, y).mean())
