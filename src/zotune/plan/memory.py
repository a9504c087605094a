"""What a run will take, before it starts: forward passes, and memory by what it is for.

Weights, state and reused activations are formulas; what the passes take is counted (`zotune.plan.passes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from zotune.apply.tensor_update import Rounding
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
from zotune.optim.zeroth_order import BlockOrder, ZerothOrder
from zotune.plan.passes import Copies

# Tensors of as many numbers as the tuned ones that a method keeps in float32; with a window it makes them anew.
_MOMENTS = {"zo_sgd_mmt": 1, "zo_adam": 2}


OVERHEAD = {"cpu": 8 << 20, "cuda": 0}
"""Bytes that the C library and the matrix kernels keep in any case, as measured."""

KEPT_PIECES = 32 << 20
"""Bytes between its pieces that the heap of forward passes comes to keep at the most, as measured."""


@dataclass(frozen=True)
class Memory:
    """Bytes that steps take, by what they are for.

    Attributes:
        weights: of the model and what is added to it.
        loading: beside the weights, only while they are made or read (in the checkpoint's precision, if it is another).
        state: of the optimizer; float32 copies of weights in half precision.
        gradients: of first-order parameters, at the moment when the step takes the most.
        activations: of a forward pass; with back-propagation all that is kept for it, and temporaries of the update.
        scratch: what a probe adds: perturbed weights piece by piece, tangents.
        reused: activations that are kept from one pass to the next.
        overhead: what the allocator and the kernels keep to themselves.
        libraries: of the process itself, where that is counted and the model is in the same memory.
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
        """While steps are taken."""
        passes = self.gradients + self.activations + self.scratch + self.reused
        return self.libraries + self.weights + self.state + passes + self.overhead

    @property
    def total(self) -> int:
        """At the most, the loading included."""
        return max(self.running, self.libraries + self.weights + self.loading)

    def to_json(self) -> dict[str, int]:
        """The parts and their total."""
        return {**asdict(self), "running": self.running, "total": self.total}


def overhead_bytes(optimizer: AnyOptimizer, device: str) -> int:
    """Bytes that the allocator and the kernels keep to themselves, on "cpu" or "cuda".

    Where passes are forward only, with what `zotune.system.malloc.keep_activations` costs.
    """
    keeps = device == "cpu" and isinstance(optimizer, ZerothOrder)
    return OVERHEAD[device] + KEPT_PIECES * keeps


def forwards_a_step(optimizer: AnyOptimizer, config: TrainConfig) -> int:
    """Forward passes of one update: for each micro-batch those of the probes, of what is recorded and compared.

    Where text is generated, a pass for each new token; as many as there may be.
    """
    if isinstance(optimizer, Hybrid):
        return config.gradient_accumulation_steps + forwards_a_step(optimizer.zeroth_order, config)
    if not isinstance(optimizer, ZerothOrder):
        return config.gradient_accumulation_steps
    blocks = len(optimizer.blocks)
    estimates = blocks if optimizer.block_order == BlockOrder.SEQUENTIAL else 1
    directions = optimizer.num_queries * blocks // estimates
    one_sided = config.difference == "forward"
    records = config.blocks is not None and not config.is_generated
    if config.method == "forward_grad":
        passes = directions
    elif one_sided:
        passes = directions + 1
    else:
        # With blocks, one more pass at x records what the probes reuse; one-sided differences have it anyway.
        passes = 2 * directions + records
    if config.method == "zo_sgd_cons":
        passes += 2 if one_sided or records else 3
    tokens = config.max_new_tokens if config.is_generated else 1
    return config.gradient_accumulation_steps * estimates * passes * tokens


def forwards_of_training(step: int, config: TrainConfig) -> int:
    """Forward passes of a run whose steps take `step` of them; the first forward gradient is checked by two more."""
    checks = 2 * config.gradient_accumulation_steps * (config.method == "forward_grad")
    return step * config.max_steps + checks


def state_bytes(optimizer: AnyOptimizer, config: StepOptions) -> int:
    """Bytes of the optimizer's state after a step: moments, and master weights."""
    if isinstance(optimizer, Hybrid):
        adam = 2 * (config.hybrid_method == "fo_adam")
        deep = chain.from_iterable(group["params"] for group in optimizer.first_order.param_groups)
        return state_bytes(optimizer.zeroth_order, config) + adam * _nbytes(deep)
    tuned = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    if not isinstance(optimizer, ZerothOrder):
        name = config.method if config.method in FIRST_ORDER else config.hybrid_method
        return 2 * (name == "fo_adam") * _nbytes(tuned)
    moments = _MOMENTS.get(config.method, 0) + (config.method == "zo_adam" and config.adam == "amsgrad")
    kept = 0 if config.window is not None else moments * sum(p.numel() for p in tuned)
    half = [p for p in tuned if p.dtype in (torch.bfloat16, torch.float16)]
    master: int = sum(p.numel() for p in half) if optimizer.rounding == Rounding.MASTER else 0
    return int(4 * (kept + master))


def largest_batch(lm: LanguageModel, examples: Sequence[Encoded], size: int, objective: Objective) -> Copies:
    """The batch of `size` examples of similar length with the most tokens, padding included; in so many copies."""
    groups = [[examples[i] for i in chosen] for chosen in batches_by_length(examples, size)]
    largest = max(groups, key=lambda some: sum(len(e.sequences) for e in some) * max(e.length for e in some))
    # A batch of more rows than there are takes some of them again.
    largest = (largest * size)[:size] if len(examples) < size else largest
    return copies_of(lm, largest, objective)


def copies_of(lm: LanguageModel, examples: Sequence[Encoded], objective: Objective) -> Copies:
    """The batch of some examples, as often as is asked for."""
    return lambda copies: collate([*examples] * copies, lm.pad_token_id, torch.device("cpu"), exact=objective.exact)


def generated(example: Encoded, new_tokens: int) -> Encoded:
    """An example whose one sequence is its prompt with all text that may be generated, read for the last token."""
    read = (*example.prompt, *[0] * new_tokens)
    return replace(example, sequences=(read,), candidates=(Candidate(0, (len(read) - 1,), (0,)),), label=0)


def cache_bytes(lm: LanguageModel, num_tokens: int, num_layers: int | None = None) -> int:
    """Bytes of the keys and values that so many tokens leave in some layers, or in all of them."""
    text = lm.config.get_text_config()
    layers = text.num_hidden_layers if num_layers is None else num_layers
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = lm.base.dtype.itemsize
    return int(2 * layers * heads * width * size * num_tokens)


def recorded_bytes(lm: LanguageModel, batch: Batch, config: StepOptions) -> int:
    """Bytes of the layers' outputs that block-wise estimation reuses."""
    if config.blocks is None:
        return 0
    _, layers = stack_of(lm.base)
    width: int = lm.base.dtype.itemsize * int(lm.config.hidden_size)
    return len(layers) * batch.input_ids.numel() * width * config.gradient_accumulation_steps


def weight_bytes(lm: LanguageModel) -> int:
    """Bytes of the model's parameters and of what is added to it, tied ones once."""
    return _nbytes({id(p): p for p in lm.module.parameters()}.values())


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
