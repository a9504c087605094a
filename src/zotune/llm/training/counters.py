"""The counters of a run: its state beside weights and optimizer, on which later steps and log lines depend; and what
the passes that they count cost.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from zotune.llm.config.run import TrainConfig
from zotune.llm.data.batches import orders
from zotune.llm.data.encoded import Encoded
from zotune.llm.models.activation_cache import SequenceCache
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.scoring.accuracy import Scorer
from zotune.llm.training.optimizers import AnyOptimizer
from zotune.model.layers import stack_of
from zotune.optim.pass_cost import PassCost, pass_cost


@dataclass
class Counters:
    """The counters of a run; see `Result`.

    Attributes:
        num_flat: steps in which all probes had the same value, so that the weights did not change.
        held_out, held_out_short: metric of the last evaluation during the run, as a number and as text.
        recent: losses of the last steps, in single precision as in the ledger.
        callbacks: what the callbacks leave to a resumed run, see `Events.exported`.
    """

    step: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    num_forwards: int = 0
    num_flat: int = 0
    seconds: float = 0.0
    held_out: float | None = None
    held_out_short: str | None = None
    recent: list[float] = field(default_factory=list)
    callbacks: dict[str, Any] = field(default_factory=dict)


def cost_of_passes(optimizer: AnyOptimizer, lm: LanguageModel, scorer: Scorer, config: TrainConfig) -> PassCost:
    """What the passes of a run cost, whose scorer may reuse the activations of lower layers."""
    cache = getattr(scorer, "__self__", None)
    return pass_cost(
        optimizer,
        batches=config.gradient_accumulation_steps,
        checkpointing=config.gradient_checkpointing,
        layers=len(stack_of(lm.base)[1]),
        reused=cache.depth if isinstance(cache, SequenceCache) and config.reuse_activations else 0,
        cut=config.hybrid_layers or 0,
    )


def spent(counters: Counters, cost: PassCost, config: TrainConfig, num_rows: int) -> dict[str, Any]:
    """The arithmetic of the steps so far, in forward passes and in passes of single layers.

    Args:
        counters: the counters of the run.
        cost: what its passes cost.
        config: its options.
        num_rows: number of training rows.
    """
    passes = counters.num_forwards, counters.step
    read = min(counters.step * config.rows_a_step, num_rows)
    layer_passes = cost.layer_passes(*passes, read / config.per_device_train_batch_size)
    return {"forward_equivalents": cost.equivalents(*passes), "layer_passes": layer_passes}


def tokens_read(counters: Counters, config: TrainConfig, rows: Sequence[Encoded]) -> int:
    """Return the tokens of the forward passes of training so far on these rows, without padding."""
    if not counters.step:
        return 0
    sizes = array("L", (sum(map(len, e.sequences)) for e in rows))
    tokens = sum(sizes[i] for batch in islice(orders(len(sizes), config), counters.step) for i in batch)
    # Each pass reads one of the batches that a step accumulates.
    return round(tokens * counters.num_forwards / (counters.step * config.gradient_accumulation_steps))
