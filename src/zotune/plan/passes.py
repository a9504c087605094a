"""The memory of the passes of a step besides the weights, counted on the `meta` device (`zotune.plan.live_memory`).

The passes run as in training: perturbed piece by piece or with several probes in a batch, with tangents, by
back-propagation, with checkpointing. Only the noise is left out, since tensors on `meta` have no data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zotune.directions.direction import Direction
from zotune.errors import UnreadTensorError
from zotune.estimate.batched_probes import side_by_side
from zotune.estimate.estimators import passes_of
from zotune.estimate.forward_mode.dual_numbers import DualParameters
from zotune.estimate.per_example.estimator import AUTO
from zotune.estimate.per_example.weights import each_alone
from zotune.estimate.perturb import WeightOffset, meta_as, nbytes, perturbed_by
from zotune.llm.config.step import StepOptions
from zotune.llm.data.collator import Batch
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.quantized.backends import supports_row_lookup
from zotune.llm.training.optimizers import AnyOptimizer
from zotune.model.layers import stack_of
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.optim.hybrid import Hybrid
from zotune.optim.master_weights import HALF, FirstOrder, MasterWeights, parameters_of
from zotune.optim.zeroth_order import ZerothOrder
from zotune.plan.live_memory import peak_of, peaks_of
from zotune.system import limits
from zotune.system.malloc import OWN_PAGES

# No fewer than any plan's probes that share a pass.
MAX_COPIES = 1 << 30


@dataclass(frozen=True)
class Pass:
    """Bytes at the peak of a pass.

    Attributes:
        activations: activations of the forward pass, those saved for a backward pass, and temporaries of the update.
        gradients: gradients of first-order parameters.
        scratch: additional memory of a probe: perturbed weights, tangents, activations of the probes that share the
            pass.
    """

    activations: int
    gradients: int = 0
    scratch: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.activations + self.gradients + self.scratch


def largest_pass(
    lm: LanguageModel, optimizer: AnyOptimizer, options: StepOptions, batch: Batch, device: str, most: int = MAX_COPIES
) -> Pass:
    """The pass of a step with the largest memory on a device ("cpu" or "cuda").

    Args:
        lm: the model on `meta`, prepared for tuning.
        optimizer: the optimizer of its tuned parameters.
        options: the options from which the optimizer was made.
        batch: the batch of a pass.
        device: the device whose memory is counted.
        most: how many probes may share a pass, within what training allows.
    """
    with meta_as(device):
        if isinstance(optimizer, ZerothOrder):
            return probe(lm, optimizer, options, batch, most)
        if not isinstance(optimizer, Hybrid):
            return back_propagation(lm, optimizer, options, batch, device)
        shallow = [t.parameter for t in optimizer.zeroth_order.tuned]
        with _frozen(shallow):
            deep = back_propagation(lm, optimizer.first_order, options, batch, device)
        # The gradients of the deep layers stay in memory during the probes of the shallow layers.
        probes = probe(lm, optimizer.zeroth_order, options, batch, most)
        probes = replace(probes, gradients=_gradients(optimizer.first_order))
        return max(deep, probes, key=lambda one: one.total)


def forward(lm: LanguageModel, batch: Batch) -> Pass:
    """The pass that scores a batch without an autograd graph."""
    with torch.no_grad(), _few_layers(lm):
        return Pass(peak_of(lambda: score(lm, batch)))


def probe(lm: LanguageModel, optimizer: ZerothOrder, options: StepOptions, batch: Batch, most: int) -> Pass:
    """The pass of a probe: the objective at perturbed weights or with tangents, at as many points as in training."""
    if options.reads_examples:
        return _probe_of_examples(lm, optimizer, options, batch, most)
    is_dual = options.method == "forward_grad"
    copies = 1 if is_dual else min(most, _points_at_once(lm, optimizer, options, batch))
    plain = forward(lm, batch).activations
    with torch.no_grad():
        if is_dual:
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                whole = peak_of(lambda: _within(_CountedTangents(optimizer.tuned), lm, batch), fused=False)
        elif copies == 1:
            whole = peak_of(lambda: _within(perturbed_by(optimizer.tuned, _ZeroOffset()), lm, batch))
        else:
            points = [_ZeroOffset() for _ in range(copies)]
            whole = peak_of(lambda: _within(side_by_side(optimizer.tuned, points), lm, batch))
    return Pass(plain, scratch=max(0, whole - plain))


def _probe_of_examples(
    lm: LanguageModel, optimizer: ZerothOrder, options: StepOptions, batch: Batch, most: int
) -> Pass:
    """The pass of a probe in which groups of examples have weights of their own.

    Raises:
        UsageError: copies of what is tuned, one for each of them, would take too much.
    """
    plain, rows = forward(lm, batch).activations, len(batch.counts)
    if options.method == "forward_grad":  # a tangent beside each activation, and each row's copies of what is tuned
        copies = 2 * len(batch.input_ids) * nbytes(optimizer.tuned, None)
        return Pass(plain, scratch=plain + copies)
    points = min(most, lm.copies_at_once(batch), passes_of(optimizer.estimator)[0])
    asked = options.directions_per_batch
    groups = asked if isinstance(asked, int) else rows // 2 if asked == AUTO else rows
    (u,) = optimizer.directions(blocks=(None,), count=1)
    own = each_alone(optimizer.tuned, [u] * groups, range(groups), [1.0] * points)
    return Pass(plain, scratch=(points - 1) * plain + own.bytes_of_copies)


def back_propagation(lm: LanguageModel, optimizer: FirstOrder, options: StepOptions, batch: Batch, device: str) -> Pass:
    """The pass of an update by back-propagation; the second update if the optimizer has a state."""
    inner = optimizer.optimizer if isinstance(optimizer, MasterWeights) else optimizer
    has_state = isinstance(inner, torch.optim.Adam)
    if options.gradient_checkpointing:
        lm.module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    tuned = parameters_of(optimizer)
    for group in optimizer.param_groups:
        group["foreach"] = device == "cuda"  # torch's own choice on these devices, which it does not make on `meta`
    alive: dict[int, int] = {}

    def count(p: Tensor) -> None:
        alive[id(p)] = gradient_bytes(p)

    def steps() -> None:
        for _ in range(1 + has_state):
            optimizer.zero_grad()
            alive.clear()
            for _ in range(min(2, options.gradient_accumulation_steps)):
                score(lm, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    handles = [p.register_post_accumulate_grad_hook(count) for p in tuned]  # type: ignore[no-untyped-call]
    lm.module.train()
    try:
        own_pages = OWN_PAGES if device == "cpu" else 0
        peak, gradients = peaks_of(steps, lambda: sum(alive.values()), own_pages=own_pages)
    finally:
        lm.module.eval()
        if options.gradient_checkpointing:
            lm.module.gradient_checkpointing_disable()  # type: ignore[operator]
        optimizer.zero_grad()
        for handle in handles:
            handle.remove()
    state = sum(t.nbytes for s in inner.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim())
    return Pass(peak - state - gradients, gradients)


def score(lm: LanguageModel, batch: Batch) -> Tensor:
    """A scalar on `meta`, computed with the same allocations as `LanguageModel.score`."""
    on_meta = replace(batch, input_ids=batch.input_ids.to("meta"), attention_mask=batch.attention_mask.to("meta"))
    if lm.classifies:
        return lm.logits(on_meta).float().sum()
    if batch.needs_only_candidates and supports_row_lookup(lm.base.get_output_embeddings()):
        return lm.logits(on_meta, batch.distinct[0].to("meta")).float().sum()
    return lm.token_log_probabilities(on_meta).double().sum()


def _points_at_once(lm: LanguageModel, optimizer: ZerothOrder, options: StepOptions, batch: Batch) -> int:
    """The number of probes that share a forward pass, as `zotune.estimate.probes` groups them."""
    most = lm.copies_at_once(batch)
    if most > 2 and nbytes(optimizer.tuned, None) * most > limits.CACHED_BYTES:
        most = 2
    points = optimizer.num_queries * passes_of(optimizer.estimator)[0]
    return min(most, points)


def _within(context: perturbed_by | side_by_side | DualParameters, lm: LanguageModel, batch: Batch) -> None:
    # If perturbed tensors are cached, those of all layers count. Otherwise two layers suffice, and the tensors of the
    # others stay unread.
    keeps = nbytes(context.tuned, None) <= limits.CACHED_BYTES
    with nullcontext() if keeps else _few_layers(lm), suppress(UnreadTensorError):
        if isinstance(context, side_by_side):
            context.evaluate(lambda: score(lm, batch))
        else:
            with context:
                score(lm, batch)


@contextmanager
def _few_layers(lm: LanguageModel) -> Iterator[None]:
    """A context in which the model has two layers if all have equal shapes; without a graph, layers save nothing."""
    path, layers = stack_of(lm.base)
    shapes = [[p.shape for p in layer.parameters()] for layer in layers]
    whole = lm.base.get_submodule(path)
    above, _, name = path.rpartition(".")
    are_alike = isinstance(whole, nn.ModuleList) and all(shape == shapes[0] for shape in shapes)
    if are_alike:
        setattr(lm.base.get_submodule(above), name, nn.ModuleList(layers[:2]))
    try:
        yield
    finally:
        setattr(lm.base.get_submodule(above), name, whole)


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


class _ZeroOffset:
    """A offset by zero."""

    tensors = None

    def move(self, out: Tensor, x: Tensor, tensor: TunedTensor, start: int) -> None:
        """Leave `out` unchanged."""

    def move_rows(self, rows: Tensor, indices: Tensor, tensor: TunedTensor) -> None:
        """Leave `rows` unchanged."""

    def factors(self, tensor: TunedTensor, device: torch.device) -> None:
        """Return None, since it has no low-rank factors."""


class _CountedTangents(DualParameters):
    def __init__(self, tuned: ParameterSet) -> None:
        super().__init__(tuned, Direction(seed=0))
        self._u: WeightOffset = _ZeroOffset()


def gradient_bytes(p: Tensor) -> int:
    """Bytes of a first-order parameter's gradient, which is in float32 if the parameter is in half precision."""
    return p.numel() * (4 if p.dtype in HALF else p.element_size())


def _gradients(optimizer: FirstOrder) -> int:
    """Bytes of all gradients of a first-order optimizer."""
    return sum(map(gradient_bytes, parameters_of(optimizer)))
