"""The objective's value is a double, whatever the numbers that it is put together from."""

import numpy as np
import pytest
import torch

import zotune as zo
from zotune.estimate.objective import as_number


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_weights_in_tensors_do_not_coarsen_the_objective(dtype):
    parts = [lambda: 1.0 + 1e-9, lambda: 1.0 + 4e-9]
    plain = zo.accumulate(parts, weights=[2, 1])()
    assert float(zo.accumulate(parts, weights=torch.tensor([2, 1], dtype=dtype))()) == plain
    assert plain == pytest.approx(1 + 2e-9, abs=1e-12)


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [float("nan"), 1]], ids=str)
def test_weights_without_a_mean_are_refused(weights):
    with pytest.raises(ValueError, match="weighted mean"):
        zo.accumulate([lambda: 1.0, lambda: 2.0], weights=weights)


@pytest.mark.parametrize("loss", [torch.tensor(1.0).half(), torch.tensor(1.0).bfloat16(), np.float16(1.0)], ids=repr)
def test_a_loss_in_half_precision_is_refused(loss):
    with pytest.raises(TypeError, match="too coarse"):
        as_number(loss)
