"""Block-coordinate descent: one block a step, by turns, at random, or the one where earlier steps found most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from zotune.directions.block_choice import Choice, OneBlock
from zotune.directions.blocks import Block, blocks_by_layer
from zotune.directions.samplers import rademacher
from zotune.directions.schedule import AnySampler
from zotune.errors import UsageError
from zotune.estimate.finite_difference import central_difference
from zotune.estimate.objective import probing
from zotune.methods.options import Difference, OwnBlocks, differences
from zotune.model.layers import stack_of
from zotune.optim.checks import as_groups
from zotune.optim.zeroth_order import ZerothOrder


def block_coordinate(  # noqa: PLR0913 - every hyper-parameter by keyword, each with a default
    model: nn.Module,
    lr: float,
    *,
    mu: float = 1e-3,
    blocks: Sequence[Block] | None = None,
    choice: Choice | str = Choice.RANDOM,
    explore: float = 0.2,
    decay: float = 0.9,
    unbiased: bool = False,
    difference: Difference = central_difference,
    sampler: AnySampler = rademacher,
    num_queries: int = 1,
    **options: Unpack[OwnBlocks],
) -> ZerothOrder:
    r"""Block-coordinate descent: each step estimates and moves one block of the tuned tensors.

        b  ~ π                                                   one of p blocks
        cᵢ = (f(x + μuᵢ) - f(x - μuᵢ)) / 2μ                       uᵢ zero outside b
        x  ← x - η (1/q) Σ cᵢ uᵢ,        divided by π_b if unbiased

        cyclic:    b = t mod p        random:  π_b = 1/p
        adaptive:  π_b = γ/p + (1 - γ) s_b / Σ s,    s_b ← δ s_b + (1 - δ) √(Σ cᵢ²/q) after a step of b

    A step's noise is that of d_b numbers, not of all d, and lower layers need not run again (`reuse_prefix`). A block
    that was not measured yet has the mean score of the others.

    Args:
        model: its parameters that require a gradient are tuned.
        lr: η ≥ 0. The noise of a block's estimate is smaller than that of all numbers, so it may be greater than that
            of `zo_sgd`.
        mu: μ > 0.
        blocks: a partition of the tuned tensors; by default `blocks_by_layer`.
        choice: "random" (LeZO keeps random layers, here one), "cyclic" (MeZO-BCD), or "adaptive" (AdaLeZO).
        explore: γ, above 0 and at most 1.
        decay: δ, at least 0 and below 1.
        unbiased: divide steps by π_b, so that E[step] = η∇f for any π, as AdaLeZO does; then a block that is rare
            takes long steps, and η is that of `zo_sgd`.
        difference: `central_difference` or `forward_difference`.
        sampler: as of `ZerothOrder`.
        num_queries: q ≥ 1, all of them of the one block.
        options: those of `ZerothOrder`.

    Forward passes a step: 2q + 1, of which one records the activations below the block, from which the others begin;
    2q with reuse_prefix=False; q + 1 with forward differences. Memory: at most the largest tuned tensor, with
    `reuse_prefix` also each layer's output. State: p numbers.

    Raises:
        ValueError: γ or δ is out of range, or the choice is unknown.

    Source: Liu et al., 2024 (LeZO, arXiv 2410.09823: random layers); Park et al., 2025 (MeZO-BCD, arXiv 2501.19099:
    by turns); AdaLeZO, 2026 (arXiv 2604.18264: a bandit chooses, with weights 1/π). The rule for π here is ours: of
    AdaLeZO's bandit excerpts alone were to be had. For the one layer of arXiv 2606.05516 see `dominant_layer`.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    >>> x, y = torch.randn(8, 3), torch.zeros(8, 1)
    >>> opt = block_coordinate(model, lr=0.05, choice="adaptive")
    >>> losses = [opt.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(100)]
    >>> losses[-1] < losses[0], [block.name for block in opt.blocks]
    (True, ['0', '2'])
    """
    if not 0 < explore <= 1:
        raise ValueError(f"explore is the share of choices that is the same for all blocks, in (0, 1]; got {explore=}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay is the share of a score that is kept, at least 0 and below 1; got {decay=}")
    groups = None if (params := options.get("params")) is None else as_groups(params)  # they may be read only once
    options["params"] = groups
    chosen = None if groups is None else [p for group in groups for p in group["params"]]
    partition = blocks_by_layer(model, chosen) if blocks is None else tuple(blocks)
    one = OneBlock(partition, Choice(choice), explore, decay, unbiased)
    return ZerothOrder(
        model,
        lr,
        estimator=differences(difference, mu),
        blocks=one,
        sampler=sampler,
        num_queries=num_queries,
        **options,
    )


def dominant_layer(
    model: nn.Module, run: Callable[[], Any], *, least: float = 100.0, ratio: float = 1000.0
) -> list[nn.Parameter]:
    """The tuned parameters of the layer at which outliers of activations first appear, to be given as `params`.

    A language model's few very large activations arise in one layer and stay in those above. Tuning that layer alone
    is said to do what tuning all of them does; a forward pass finds it.

    Args:
        model: a model with a stack of layers; of its parameters those that require a gradient are returned.
        run: runs the model once on some text, such as the objective.
        least: a layer's output h has outliers if the largest magnitude of h is above this, > 0,
        ratio: and above this multiple, > 0, of the median of the magnitudes.

    Raises:
        UsageError: as `dominant_index`, or the layer's parameters are frozen.

    Source: arXiv 2606.05516.

    >>> layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    >>> _ = layers[1].weight[0].data.fill_(1e6)
    >>> chosen = dominant_layer(layers, lambda: layers(torch.ones(1, 8)))
    >>> chosen[0] is layers[1].weight
    True
    """
    first, (path, layers) = dominant_index(model, run, least=least, ratio=ratio), stack_of(model)
    own = [p for p in layers[first].parameters() if p.requires_grad]
    if not own:
        raise UsageError(
            f"the outliers appear in {path}.{first}, none of whose parameters requires a gradient; let them."
        )
    return own


def dominant_index(model: nn.Module, run: Callable[[], Any], *, least: float = 100.0, ratio: float = 1000.0) -> int:
    """The number of the layer at which outliers of activations first appear; see `dominant_layer`.

    Args:
        model: a model with a stack of layers.
        run: runs the model once on some text.
        least: a layer's output h has outliers if the largest magnitude of h is above this, > 0,
        ratio: and above this multiple, > 0, of the median of the magnitudes. Both are ours, for the source gives no
            threshold that could be read.

    Raises:
        UsageError: the model has no stack of layers, or none of their outputs has outliers.
    """
    layers = stack_of(model)[1]
    if not layers:
        raise UsageError(f"{type(model).__name__} has no stack of layers, of which one could be dominant.")
    found = magnitudes(model, run)
    first = next((i for i, (top, mid) in found.items() if top > least and top > ratio * mid), None)
    if first is None:
        seen = ", ".join(f"{i}: {top:.3g} and {mid:.3g}" for i, (top, mid) in found.items())
        nearest = max(found, key=lambda i: found[i][0] / max(found[i][1], 1e-30), default=0)
        raise UsageError(
            f"no layer's output has outliers: none has a maximum above {least:g} and above {ratio:g} times its median "
            f"(maximum and median of |h| by layer: {seen}), so no layer is dominant. Choose a layer yourself, such as "
            f"{nearest}, where the ratio is largest, or tune all layers."
        )
    return first


@torch.no_grad()
def magnitudes(model: nn.Module, run: Callable[[], Any]) -> dict[int, tuple[float, float]]:
    """The largest magnitude and the median of the magnitudes of each layer's first output, in one run."""
    found: dict[int, tuple[float, float]] = {}

    def note(index: int) -> Callable[..., None]:
        def after(layer: nn.Module, args: Any, output: Any) -> None:
            h = output if isinstance(output, Tensor) else output[0]
            sizes = h.detach().abs().float().flatten()
            found.setdefault(index, (float(sizes.max()), float(sizes.median())))

        return after

    handles = [layer.register_forward_hook(note(index)) for index, layer in enumerate(stack_of(model)[1])]
    try:
        with probing(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return dict(sorted(found.items()))
