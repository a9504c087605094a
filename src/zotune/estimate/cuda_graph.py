"""Probes of an objective of static shapes as one CUDA graph: a step launches once, where it launched each kernel.

A graph repeats its kernels with the arguments that they were captured with. Those of the noise read their seeds from
the device's memory, where `zotune.noise.launch.Rebinding` writes the next step's: every replay probes new directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.directions.direction import Direction
from zotune.directions.samplers import kernel_of
from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate, averaged
from zotune.estimate.finite_difference import central_difference
from zotune.estimate.objective import Batched, Closure, batched, probing
from zotune.estimate.probes import values_at
from zotune.model.parameters import ParameterSet


@dataclass(frozen=True)
class _Captured:
    """A graph, and what it is one of.

    Attributes:
        key: what must be as it was: where the weights lie, and the kind of the directions.
        seeds: of the directions that it was captured with, in order.
        values: shape (2q,), float64; a replay writes them.
    """

    key: Any
    seeds: tuple[int, ...]
    graph: Any
    noise: Any
    values: Tensor


class CUDAGraphDifference:
    """`zotune.central_difference` of one objective over batches of one shape, captured once and replayed at each step.

    On a GPU where a step takes long to launch and not to compute (small batches, many layers), it takes no longer
    than its kernels. The bits are those of `central_difference`. Without a CUDA device it is `central_difference`.

    Args:
        losses: as for `zotune.batched`: given the inputs, the loss of each example. It must not read a number of the
            GPU (`.item()`, conditions on tensors), nor make tensors elsewhere.
        inputs: a first batch; its shapes and dtypes are those of all.
        mu: μ > 0, as in `central_difference`.

    Raises:
        UsageError: at a step, where the objective cannot be captured or the directions are none with kernels of their
            own; in `on`, where a batch has another shape.

    >>> from functools import partial
    >>> from torch import nn
    >>> from zotune import ZerothOrder
    >>> model, x, y = nn.Linear(3, 1), torch.randn(8, 3), torch.zeros(8, 1)
    >>> probe = CUDAGraphDifference(lambda x, y: (model(x) - y).square().mean(dim=1), x, y, mu=1e-3)
    >>> opt = ZerothOrder(model, lr=0.05, estimator=probe)
    >>> losses = [opt.step(probe.on(x, y)) for _ in range(100)]
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(self, losses: Callable[..., Tensor], *inputs: Tensor, mu: float) -> None:
        self._inputs = tuple(x.clone() for x in inputs)
        self._objective, self._mu = batched(losses, *self._inputs), mu
        self._captured: _Captured | None = None

    def on(self, *inputs: Tensor) -> Batched:
        """The objective over another batch: a closure for `step`. It is that of the last call's batch.

        Raises:
            UsageError: a tensor has another shape or dtype than the first batch's.
        """
        wanted = [(tuple(x.shape), x.dtype) for x in self._inputs]
        given = [(tuple(x.shape), x.dtype) for x in inputs]
        if given != wanted:
            raise UsageError(
                f"a graph is of the shapes and dtypes that it was captured with, {wanted}, got {given}: pad the batch "
                "to them, or use zotune.batched for batches of any shape."
            )
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x, non_blocking=True)
        return self._objective

    def __call__(self, closure: Closure, tuned: ParameterSet, directions: Sequence[Direction]) -> GradientEstimate:
        """As `zotune.estimate.finite_difference.Estimator`; `closure` is what `on` gave."""
        if closure is not self._objective:
            raise UsageError("a graphed estimator knows its own objective alone: opt.step(probe.on(x, y)).")
        if not all(x.is_cuda for x in self._inputs) or not all(t.device.type == "cuda" for t in tuned):
            return central_difference(closure, tuned, directions, mu=self._mu)
        _check_sampler(directions)
        key = (_places(tuned), tuple((u.sampler, u.block) for u in directions))
        seeds = tuple(u.seed for u in directions)
        if self._captured is None or self._captured.key != key:
            self._captured = self._capture(key, tuned, directions)
        found = self._captured
        found.noise.rebind(dict(zip(found.seeds, seeds, strict=True)))
        found.graph.replay()
        values = found.values.tolist()
        pairs = zip(values[::2], values[1::2], strict=True)
        terms = averaged([(plus - minus) / (2 * self._mu) for plus, minus in pairs], directions)
        return GradientEstimate(sum(values) / len(values), terms, num_forwards=len(values))

    def _capture(self, key: Any, tuned: ParameterSet, directions: Sequence[Direction]) -> _Captured:
        from zotune.noise.launch import Rebinding

        points = [(a, u) for u in directions for a in (self._mu, -self._mu)]

        def values() -> Tensor:
            return torch.stack([torch.as_tensor(v) for v in values_at(self._objective, tuned, points)])

        noise, graph = Rebinding(), torch.cuda.CUDAGraph()
        with probing(tuned.model):
            # On a stream beside, as a capture is: kernels are built, libraries begun, and the copies tried apart.
            beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                values()
                with noise:
                    values()
            torch.cuda.current_stream().wait_stream(beside)
            try:
                with noise, torch.cuda.graph(graph):
                    found = values()
            except RuntimeError as error:
                raise UsageError(
                    f"the objective cannot be captured as a CUDA graph ({str(error).splitlines()[0]}): it must not "
                    "read numbers of the GPU. zotune.central_difference does without a graph."
                ) from error
        return _Captured(key, tuple(u.seed for u in directions), graph, noise, found)


def _places(tuned: ParameterSet) -> tuple[int, ...]:
    """Where a model's numbers lie: a graph reads and writes there."""
    return tuple(t.data_ptr() for t in (*tuned.model.parameters(), *tuned.model.buffers()))


def _check_sampler(directions: Sequence[Direction]) -> None:
    if any(kernel_of(u.sampler) is None for u in directions):
        raise UsageError(
            "only directions of zotune.rademacher and zotune.gaussian have kernels that a graph can repeat, got "
            f"{directions[0].sampler!r}: use zotune.central_difference."
        )
    if len({u.seed for u in directions}) != len(directions):
        raise UsageError("directions of several blocks share their seed, which a graph cannot tell apart.")
