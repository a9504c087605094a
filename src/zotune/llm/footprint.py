"""What a run will take, before it starts: forward passes, and memory by what it is for.

Weights, state and reused activations are formulas; activations (and a first-order method's gradients) are
counted by running the model's largest batch on the `meta` device, where tensors have a size and no numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from zotune.hybrid import Hybrid
from zotune.llm.config import TrainConfig
from zotune.llm.encoding import Batch, Candidate, Encoded, collate
from zotune.llm.evaluate import by_length
from zotune.llm.live_memory import peak_of
from zotune.llm.method_options import FIRST_ORDER
from zotune.llm.models import MAX_LOGITS, LanguageModel
from zotune.llm.objective import Objective
from zotune.llm.optimizers import AnyOptimizer
from zotune.llm.quantization import gives_rows
from zotune.optimizer import BlockOrder, ZerothOrder
from zotune.perturb import piece_elements
from zotune.stack import stack_of
from zotune.update import Rounding

# Tensors of as many numbers as the tuned ones that a method keeps in float32; with a window it makes them anew.
_MOMENTS = {"zo_sgd_mmt": 1, "zo_adam": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes, by what they are for.

    Attributes:
        libraries: of the process itself, where the model is in the same memory; 0 for a GPU.
        weights: of the model and what is added to it.
        loading: beside the weights, only while they are read: the checkpoint, if its precision is another.
        state: of the optimizer; float32 copies of weights in half precision.
        activations: of a forward pass of the largest batch; with back-propagation all that is kept, and gradients.
        scratch: where perturbed weights are made piece by piece.
        reused: activations that are kept from one pass to the next.
    """

    libraries: int
    weights: int
    loading: int
    state: int
    activations: int
    scratch: int
    reused: int

    @property
    def total(self) -> int:
        """At the most."""
        running = self.state + self.activations + self.scratch + self.reused
        return self.libraries + self.weights + max(self.loading, running)


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


def state_bytes(optimizer: AnyOptimizer, config: TrainConfig) -> int:
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


def scratch_bytes(optimizer: AnyOptimizer, lm: LanguageModel, num_tokens: int, device: str) -> int:
    """Bytes of perturbed weights at a time: a piece of a linear layer or some rows of an embedding, else a tensor."""
    if isinstance(optimizer, Hybrid):
        optimizer = optimizer.zeroth_order
    if not isinstance(optimizer, ZerothOrder):
        return 0
    by_piece = {id(m.weight) for m in lm.module.modules() if isinstance(m, nn.Linear)}
    # An embedding with fewer rows than there are tokens is perturbed whole.
    by_piece |= {
        id(m.weight) for m in lm.module.modules() if isinstance(m, nn.Embedding) and num_tokens <= m.weight.shape[0]
    }
    piece = piece_elements(device)
    sizes = [
        min(p.numel(), piece) * p.element_size() if id(p) in by_piece else p.numel() * p.element_size()
        for p in (t.parameter for t in optimizer.tuned)
    ]
    return max(sizes)


def largest_batch(lm: LanguageModel, examples: Sequence[Encoded], size: int, objective: Objective) -> Batch:
    """The batch of `size` examples of similar length with the most tokens, padding included."""
    groups = [[examples[i] for i in chosen] for chosen in by_length(examples, size)]
    largest = max(groups, key=lambda some: sum(len(e.sequences) for e in some) * max(e.length for e in some))
    # A batch of more rows than there are takes some of them again.
    largest = (largest * size)[:size] if len(examples) < size else largest
    return collate(largest, lm.pad_token_id, torch.device("cpu"), exact=objective.exact)


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


def forward_bytes(lm: LanguageModel, batch: Batch) -> int:
    """Bytes that scoring a batch takes beside the weights."""
    with torch.no_grad():
        return peak_of(lambda: _score(lm, batch))


def backward_bytes(lm: LanguageModel, batch: Batch, optimizer: torch.optim.Optimizer, *, checkpointing: bool) -> int:
    """Bytes that updates by back-propagation take beside the weights: activations, gradients and state."""
    if checkpointing:
        lm.module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def steps() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            _score(lm, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    lm.module.train()
    try:
        return peak_of(steps)
    finally:
        lm.module.eval()


def activation_bytes(
    lm: LanguageModel, optimizer: AnyOptimizer, config: TrainConfig, trained: Batch, evaluated: Batch | None
) -> int:
    """Bytes of activations (and gradients) at the most, in training or evaluation."""
    forward = max(forward_bytes(lm, b) for b in (trained, evaluated) if b is not None)
    if isinstance(optimizer, ZerothOrder):
        # A dual number carries a tangent with each value.
        return forward * (2 if config.method == "forward_grad" else 1)
    first_order, name = optimizer, config.method
    frozen: list[nn.Parameter] = []
    if isinstance(optimizer, Hybrid):
        first_order, name = optimizer.first_order, config.hybrid_method
        frozen = [t.parameter for t in optimizer.zeroth_order.tuned]
    assert isinstance(first_order, torch.optim.Optimizer)
    tuned = chain.from_iterable(group["params"] for group in first_order.param_groups)
    state = 2 * _nbytes(tuned) if name == "fo_adam" else 0
    for p in frozen:
        p.requires_grad_(False)
    try:
        backward = backward_bytes(lm, trained, first_order, checkpointing=config.gradient_checkpointing)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return max(forward, backward - state)


def recorded_bytes(lm: LanguageModel, batch: Batch, config: TrainConfig) -> int:
    """Bytes of the layers' outputs that block-wise estimation reuses."""
    if config.blocks is None:
        return 0
    _, layers = stack_of(lm.base)
    width: int = lm.base.dtype.itemsize * int(lm.config.hidden_size)
    return len(layers) * batch.input_ids.numel() * width * config.gradient_accumulation_steps


def _score(lm: LanguageModel, batch: Batch) -> Tensor:
    """The computation of `LanguageModel.score` as far as it takes memory; a number without one."""
    on_meta = replace(
        batch,
        input_ids=batch.input_ids.to("meta"),
        attention_mask=batch.attention_mask.to("meta"),
        positions=batch.positions.to("meta"),
    )
    head = lm.base.get_output_embeddings()
    if lm.classifies:
        return lm.logits(on_meta).float().sum()
    if batch.needs_only_candidates and gives_rows(head):
        return lm.logits(on_meta, batch.distinct[0].to("meta")).float().sum()
    some = on_meta.positions[: max(1, MAX_LOGITS // lm.vocabulary)]
    return torch.logsumexp(lm.logits(replace(on_meta, positions=some)).float(), dim=1).sum()


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
