"""How near an estimate is to the gradient: both at the same weights and rows, the gradient by autograd.

With d tuned numbers and q directions of which nothing but E[uuᵀ] = I is used, a linear objective has
E‖ĝ − ∇f‖² = ‖∇f‖² (d + k)/q with k = −1 for Rademacher and 1 for Gaussian directions (Nesterov and Spokoiny,
2017; the paper's figure 2 is about what that does to accuracy).
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
    """`max_steps` estimates at the untuned weights, on the first batch of the training rows."""
    config = validate(TrainConfig, options, "the benchmark's estimates")
    began = time.perf_counter()
    lm = load(config, head_labels(config), config.seed)
    prepare_tuning(lm, config)
    closure = _first_batch(lm, load_rows(lm, config), config.per_device_train_batch_size)
    tuned = ParameterSet.of(lm.module)
    gradient = true_gradient(closure, tuned)
    before = lm.num_forwards
    found = [
        against(estimate, gradient, tuned)
        for estimate in (_estimate(lm, config, i, closure) for i in range(config.max_steps))
    ]
    values = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    d = sum(g.numel() for g in gradient)
    run = RunRecord(
        seed=config.seed,
        values={**values, **_expected(config, d), "gradient_norm": _norm(gradient)},
        num_steps=config.max_steps,
        num_forwards=lm.num_forwards - before,
        num_tuned=d,
        seconds=time.perf_counter() - began,
        peak_memory=peak_memory(lm.device),
    )
    return {"run": run.model_dump(mode="json")}


def true_gradient(closure: Callable[[], Tensor], tuned: ParameterSet) -> list[Tensor]:
    """∇f of each tuned tensor, float64, by back-propagation."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(closure(), [t.parameter for t in tuned], allow_unused=True)
    return [
        torch.zeros_like(t.parameter, dtype=torch.float64) if g is None else g.double()
        for g, t in zip(gradients, tuned, strict=True)
    ]


def against(estimate: GradientEstimate, gradient: Sequence[Tensor], tuned: ParameterSet) -> dict[str, float]:
    """Cosine of the angle between ĝ and ∇f; ‖ĝ − ∇f‖² / ‖∇f‖²; and ĝ·∇f / ‖∇f‖², whose mean is 1 without a bias."""
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
    """By the formula above, where it holds: all entries of a direction drawn, all tensors at once."""
    if config.blocks is not None or config.sparsity:
        return {"expected_relative_variance": None}
    k = -1 if config.sampler == "rademacher" else 1
    return {"expected_relative_variance": (d + k) / config.num_queries}


def _norm(gradient: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradient))


def _estimate(lm: LanguageModel, config: TrainConfig, number: int, closure: Callable[[], Tensor]) -> GradientEstimate:
    """An estimate of its own seed; the optimizer's work ends there."""
    optimizer = make_optimizer(lm.module, config, derive_seed(config.seed, number) >> 1, closure)
    assert isinstance(optimizer, ZerothOrder)
    with torch.no_grad():
        return optimizer.estimate(closure)


def _first_batch(lm: LanguageModel, rows: EncodedData, size: int) -> Callable[[], Tensor]:
    """The mean loss of the first rows."""
    examples = rows.train[:size]
    batch = collate(examples, lm.pad_token_id, lm.device, exact=rows.objective.exact)
    return lambda: mean_loss(rows.objective, lm.score(batch), batch, examples)
