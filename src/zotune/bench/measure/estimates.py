"""The error of a gradient estimate: the estimate and autograd's gradient at the same weights and rows.

For d tuned parameters and q directions with E[uuᵀ] = I, a linear objective has E‖ĝ − ∇f‖² = ‖∇f‖² (d + k)/q, where
k = −1 for Rademacher and k = 1 for Gaussian directions (Nesterov and Spokoiny, 2017). The paper's figure 2 shows the
effect of q on accuracy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zotune.bench.results.records import RunRecord
from zotune.estimate.estimate import GradientEstimate
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import validate
from zotune.llm.data.collator import collate
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import load
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.scoring.objectives import mean_loss
from zotune.llm.tasks import head_labels
from zotune.llm.tasks.load_data import EncodedData, load_rows
from zotune.llm.training.optimizers import make_optimizer
from zotune.model.parameters import ParameterSet
from zotune.noise import derive_seed
from zotune.optim.zeroth_order import ZerothOrder
from zotune.system.peak_memory import peak_memory


def estimated(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compare `max_steps` estimates with the gradient, at the untuned weights and the first batch of training rows."""
    config = validate(TrainConfig, options, "the benchmark's estimates")
    start = time.perf_counter()
    lm = load(config, head_labels(config), config.seed)
    prepare_tuning(lm, config)
    closure = _first_batch(lm, load_rows(lm, config), config.per_device_train_batch_size)
    tuned = ParameterSet.of(lm.module)
    gradient = true_gradient(closure, tuned)
    before = lm.num_forwards
    errors = [
        compare_with_gradient(estimate, gradient, tuned)
        for estimate in (_estimate(lm, config, i, closure) for i in range(config.max_steps))
    ]
    values = {name: sum(one[name] for one in errors) / len(errors) for name in errors[0]}
    d = sum(g.numel() for g in gradient)
    run = RunRecord(
        seed=config.seed,
        values={**values, **_expected(config, d), "gradient_norm": _norm(gradient)},
        num_steps=config.max_steps,
        num_forwards=lm.num_forwards - before,
        num_tuned=d,
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(lm.device),
    )
    return {"run": run.model_dump(mode="json")}


def true_gradient(closure: Callable[[], Tensor], tuned: ParameterSet) -> list[Tensor]:
    """∇f of each tuned tensor in float64, by back-propagation; zeros for a tensor without a gradient."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(closure(), [t.parameter for t in tuned], allow_unused=True)
    return [
        torch.zeros_like(t.parameter, dtype=torch.float64) if g is None else g.double()
        for g, t in zip(gradients, tuned, strict=True)
    ]


def compare_with_gradient(
    estimate: GradientEstimate, gradient: Sequence[Tensor], tuned: ParameterSet
) -> dict[str, float]:
    """Compare an estimate ĝ with the gradient ∇f.

    Returns:
        `cosine` of the angle between both; `relative_variance`, ‖ĝ − ∇f‖² / ‖∇f‖²; and `projection`, ĝ·∇f / ‖∇f‖²,
        whose expectation is 1 for an unbiased estimate.
    """
    dot = norm = error = 0.0
    for tensor, g in zip(tuned, gradient, strict=True):
        part = estimate.of(tuned, tensor.name).double().reshape(g.shape)
        dot += float((part * g).sum())
        norm += float(part.square().sum())
        error += float((part - g).square().sum())
    size = _norm(gradient)
    return {
        "cosine": dot / max(math.sqrt(norm) * size, 1e-300),
        "relative_variance": error / max(size**2, 1e-300),
        "projection": dot / max(size**2, 1e-300),
    }


def _expected(config: TrainConfig, d: int) -> dict[str, float | None]:
    """The relative variance by the formula above; None where it does not hold, with blocks or sparse directions."""
    if config.blocks is not None or config.sparsity:
        return {"expected_relative_variance": None}
    k = -1 if config.sampler == "rademacher" else 1
    return {"expected_relative_variance": (d + k) / config.num_queries}


def _norm(gradient: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradient))


def _estimate(lm: LanguageModel, config: TrainConfig, number: int, closure: Callable[[], Tensor]) -> GradientEstimate:
    """An estimate with a seed derived from `number`; no update follows."""
    optimizer = make_optimizer(lm.module, config, derive_seed(config.seed, number) >> 1, closure)
    assert isinstance(optimizer, ZerothOrder)
    with torch.no_grad():
        return optimizer.estimate(closure)


def _first_batch(lm: LanguageModel, rows: EncodedData, size: int) -> Callable[[], Tensor]:
    """A closure that computes the mean loss of the first `size` training rows."""
    examples = rows.train[:size]
    batch = collate(examples, lm.pad_token_id, lm.device, exact=rows.objective.exact)
    return lambda: mean_loss(rows.objective, lm.score(batch), batch, examples)
