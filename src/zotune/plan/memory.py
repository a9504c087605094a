"""The forward passes and the memory of a run, predicted before it starts.

Weights, optimizer state and cached activations follow from formulas; the memory of passes is counted
(`zotune.plan.passes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from zotune.apply.tensor_update import Rounding
from zotune.directions.input_scaled import InputScaled
from zotune.directions.low_rank import matrix_shapes
from zotune.directions.within import Within
from zotune.estimate.estimators import passes_of
from zotune.estimate.forward_mode.gradient_check import is_compared, precision_of
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.step import StepOptions
from zotune.llm.data.collator import Batch, collate
from zotune.llm.data.tokenization import Candidate, Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.scoring.accuracy import batches_by_length
from zotune.llm.scoring.objectives import Objective
from zotune.llm.training.optimizers import AnyOptimizer
from zotune.model.layers import stack_of
from zotune.optim.hybrid import Hybrid
from zotune.optim.master_weights import HALF, parameters_of
from zotune.optim.zeroth_order import BlockOrder, ZerothOrder
from zotune.plan.passes import gradient_bytes

# Number of float32 moments per tuned parameter; with a window, moments are recomputed and not stored.
_MOMENTS = {"zo_sgd_mmt": 1, "zo_adam": 2, "hizoo": 1}


OVERHEAD = {"cpu": 8 << 20, "cuda": 0}
"""Bytes that the C library and the matrix kernels always hold, as measured."""

HEAP_FRAGMENTATION = 32 << 20
"""Largest number of bytes that the heap of forward passes loses to fragmentation, as measured."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step by purpose.

    Attributes:
        weights: weights of the model and of an adapter.
        loading: further bytes while weights are initialised, or read in the precision of the checkpoint.
        state: state of the optimizer, and float32 copies of weights in half precision.
        gradients: gradients of first-order parameters at the peak of the step.
        activations: activations of a forward pass; with back-propagation also the saved ones and temporaries of the
            update.
        scratch: additional memory of a probe: perturbed weights piece by piece, tangents.
        reused: activations that are cached from one pass to the next.
        overhead: memory that the allocator and the kernels hold.
        libraries: memory of the process and its libraries, if it is counted and the model is in the same memory.
    """

    weights: int
    loading: int
    state: int
    gradients: int
    activations: int
    scratch: int
    reused: int
    overhead: int
    libraries: int = 0

    @property
    def running(self) -> int:
        """Bytes during training steps."""
        passes = self.gradients + self.activations + self.scratch + self.reused
        return self.libraries + self.weights + self.state + passes + self.overhead

    @property
    def total(self) -> int:
        """Peak bytes, with loading."""
        return max(self.running, self.libraries + self.weights + self.loading)

    def to_json(self) -> dict[str, int]:
        """The parts and their total."""
        return {**asdict(self), "running": self.running, "total": self.total}


def overhead_bytes(optimizer: AnyOptimizer, device: str) -> int:
    """Bytes that the allocator and the kernels hold on "cpu" or "cuda".

    For forward-only methods on a CPU this includes the cost of `zotune.system.malloc.keep_activations`.
    """
    keeps = device == "cpu" and isinstance(optimizer, ZerothOrder)
    return OVERHEAD[device] + HEAP_FRAGMENTATION * keeps


def forwards_a_step(optimizer: AnyOptimizer, config: TrainConfig) -> int:
    """Forward passes of one update: for each micro-batch those of the probes, of recording and of comparing steps.

    Generated text counts one pass for each new token, up to the maximum.
    """
    if isinstance(optimizer, Hybrid):
        return config.gradient_accumulation_steps + forwards_a_step(optimizer.zeroth_order, config)
    if not isinstance(optimizer, ZerothOrder):
        return config.gradient_accumulation_steps
    blocks = len(optimizer.active_blocks)
    estimates = blocks if optimizer.block_order == BlockOrder.SEQUENTIAL else 1
    each, at_x = passes_of(optimizer.estimator)
    # With blocks, a further pass at x records activations that probes reuse; one-sided differences have it anyway.
    if config.blocks is not None and not config.is_generated and config.method != "forward_grad":
        at_x = max(at_x, 1)
    passes = each * (optimizer.num_queries * blocks // estimates) + at_x
    if config.method == "zo_sgd_cons":
        passes += 2 if at_x else 3
    tokens = config.max_new_tokens if config.is_generated else 1
    return config.gradient_accumulation_steps * estimates * passes * tokens


def forwards_of_training(step: int, config: TrainConfig, module: nn.Module) -> int:
    """Forward passes of a run with `step` passes per step.

    The check of the first forward gradient needs two more, except in half precision.
    """
    is_checked = config.method == "forward_grad" and is_compared(precision_of(module))
    checks = 2 * config.gradient_accumulation_steps * is_checked
    return step * config.max_steps + checks


def state_bytes(optimizer: AnyOptimizer, config: StepOptions) -> int:
    """Bytes of the optimizer's state after a step: moments, master weights, and bases of subspaces."""
    if isinstance(optimizer, Hybrid):
        deep = parameters_of(optimizer.first_order)
        return state_bytes(optimizer.zeroth_order, config) + first_order_state_bytes(deep, config.hybrid_method)
    if not isinstance(optimizer, ZerothOrder):
        name = config.method if config.method in FIRST_ORDER else config.hybrid_method
        return first_order_state_bytes(parameters_of(optimizer), name)
    tuned = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    moments = _MOMENTS.get(config.method, 0) + (config.method == "zo_adam" and config.adam == "amsgrad")
    stored = 0 if config.window is not None else moments * sum(p.numel() for p in tuned)
    half = [p for p in tuned if p.dtype in HALF]
    master: int = sum(p.numel() for p in half) if optimizer.rounding == Rounding.MASTER else 0
    return int(4 * (stored + master + _subspace_numbers(optimizer, config)))


def _subspace_numbers(optimizer: ZerothOrder, config: StepOptions) -> int:
    """Numbers that a method in subspaces stores: its bases, and a state of the coordinates' size."""
    shapes = matrix_shapes(optimizer.tuned).values()
    rank = config.rank or 0
    if isinstance(optimizer.sampler, Within):
        sides = ((s.left, s.right) for s in optimizer.sampler.subspaces.values())
        return sum(side.numel() for pair in sides for side in pair if side is not None)
    if isinstance(optimizer.sampler, InputScaled):
        return sum(scale.numel() for scale in optimizer.sampler.scales.values())
    if config.method in ("zo_muon", "mopi"):
        bases = sum(m * min(rank, m) for m, _ in shapes)
        of_state = [(min(rank, m) + min(config.spectral_rank, rank, m, n)) * n for m, n in shapes]
        return bases + (sum(of_state) if config.method == "mopi" else 0)
    if config.method == "subzero":
        return sum((m + n) * min(rank, m, n) for m, n in shapes)
    if config.method == "lozo" and config.momentum:
        vectors = sum(t.parameter.numel() for t in optimizer.tuned if t.parameter.dim() < 2)
        return sum(m * rank for m, _ in shapes) + vectors
    return 0


def first_order_state_bytes(parameters: Iterable[Tensor], name: str) -> int:
    """Bytes of the moments of `fo_adam`, and of the float32 copies of parameters in half precision."""
    tuned = list(parameters)
    moments = 2 * (name == "fo_adam") * sum(map(gradient_bytes, tuned))
    return moments + sum(4 * p.numel() for p in tuned if p.dtype in HALF)


def largest_batch(lm: LanguageModel, examples: Sequence[Encoded], size: int, objective: Objective) -> Batch:
    """The batch with the most tokens, with padding, among batches of `size` examples of similar length."""
    groups = [[examples[i] for i in chosen] for chosen in batches_by_length(examples, size)]
    largest = max(groups, key=lambda some: sum(len(e.sequences) for e in some) * max(e.length for e in some))
    # If there are fewer examples than the batch size, some are repeated.
    largest = (largest * size)[:size] if len(examples) < size else largest
    return batch_of(lm, largest, objective)


def batch_of(lm: LanguageModel, examples: Sequence[Encoded], objective: Objective) -> Batch:
    """The batch of some examples, on the CPU."""
    return collate(examples, lm.pad_token_id, torch.device("cpu"), exact=objective.exact)


def generated(example: Encoded, new_tokens: int) -> Encoded:
    """An example with one sequence, its prompt and the longest text that may be generated, scored at the last token."""
    sequence = (*example.prompt, *[0] * new_tokens)
    return replace(example, sequences=(sequence,), candidates=(Candidate(0, (len(sequence) - 1,), (0,)),), label=0)


def cache_bytes(lm: LanguageModel, num_tokens: int, num_layers: int | None = None) -> int:
    """Bytes of the keys and values of `num_tokens` tokens in `num_layers` layers, by default in all layers."""
    text = lm.config.get_text_config()
    layers = text.num_hidden_layers if num_layers is None else num_layers
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = lm.base.dtype.itemsize
    return int(2 * layers * heads * width * size * num_tokens)


def recorded_bytes(lm: LanguageModel, batch: Batch, config: StepOptions) -> int:
    """Bytes of the layers' outputs that block-wise estimation caches."""
    if config.blocks is None:
        return 0
    _, layers = stack_of(lm.base)
    width: int = lm.base.dtype.itemsize * int(lm.config.get_text_config().hidden_size)
    return len(layers) * batch.input_ids.numel() * width * config.gradient_accumulation_steps


def weight_bytes(lm: LanguageModel) -> int:
    """Bytes of the model's parameters and of an adapter; tied parameters count once."""
    return _nbytes({id(p): p for p in lm.module.parameters()}.values())


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
