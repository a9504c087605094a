"""The leading principal components of what each tuned tensor multiplies, found by forward passes alone.

    y = W x:     C = Σ x xᵀ over the rows x that a linear layer reads
    y = g ⊙ x:   the same for the gain of a norm, x being the normalised row

The gradient of W is a sum of outer products with these x, so its rows lie in their span, mostly in that of the leading
eigenvectors of C. They are found by block power iteration: a pass takes Q to C Q = Σ x (xᵀ Q), for all tensors at once,
without C itself. C is not centred: the mean of x is a direction that a gradient has as well.
Source: Wang et al., 2026 (AGZO, arXiv 2601.17261); Halko et al., 2011 (arXiv 0909.4061), for the iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zotune.directions.samplers import Subspace
from zotune.errors import UsageError
from zotune.model.parameters import ParameterSet, TunedTensor

# Columns beyond the wanted ones, with which the wanted ones converge faster.
_EXTRA = 8
# Of the rows that a module reads, those that count: its inputs (…, n) to (rows, n).
Rows = Callable[[nn.Module, Tensor], Tensor]


class LeadingVectors:
    """The leading eigenvectors of C = Σ x xᵀ (n × n), by block power iteration in double precision.

    >>> it = LeadingVectors(3, 1, "cpu")
    >>> for _ in range(3):
    ...     it.add(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    ...     it.turn()
    >>> it.found.abs().round(decimals=6).flatten().tolist()
    [1.0, 0.0, 0.0]
    """

    def __init__(self, n: int, rank: int, device: torch.device | str) -> None:
        self._rank = rank
        start = torch.randn(n, min(n, rank + _EXTRA), dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        self._basis = torch.linalg.qr(start).Q.to(device)
        self._product = torch.zeros_like(self._basis)
        self.found, self.num_rows = self._basis[:, :rank].float(), 0

    def add(self, x: Tensor) -> None:
        """Add the rows of x (rows, n) to C, of which only the product with the basis is formed."""
        x = x.double()
        self.num_rows += len(x)
        self._product += x.t() @ (x @ self._basis)

    def turn(self) -> None:
        """End a pass over all rows: `found` are the best vectors within the basis, and the product is the next one."""
        small = self._basis.t() @ self._product
        vectors = torch.linalg.eigh((small + small.t()) / 2).eigenvectors.flip(1)
        self.found = (self._basis @ vectors[:, : self._rank]).float()
        self._basis = torch.linalg.qr(self._product).Q
        self._product = torch.zeros_like(self._basis)


def principal_subspaces(
    model: nn.Module | ParameterSet,
    run: Callable[[], object],
    rank: int,
    *,
    passes: int = 4,
    rows: Rows | None = None,
) -> dict[str, Subspace]:
    """The leading principal components of what each tuned tensor of a model multiplies; for `zotune.within`.

    Args:
        model: with the tuned tensors. Those that are the weight of a linear layer or the gain of a norm get a subspace,
            unless it would be all of the space, or unless an embedding reads them too.
        run: runs forward passes over some typical inputs; always the same ones.
        rank: components of each tensor, ≥ 1.
        passes: how often `run` is called, ≥ 1.
        rows: of what a module reads, the rows that count, such as those of tokens that are no padding; default: all.

    Raises:
        UsageError: a value is out of range, or a tensor was not read.

    Memory: 2 (rank + 8) n double numbers for a tensor that multiplies rows of n.

    >>> import zotune as zo
    >>> model = nn.Linear(3, 2, bias=False)
    >>> found = principal_subspaces(model, lambda: model(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])), 1)
    >>> found["weight"].right.abs().round(decimals=4).flatten().tolist()
    [0.0, 1.0, 0.0]
    """
    if rank < 1 or passes < 1:
        raise UsageError(f"a subspace has at least one dimension and takes at least one pass, got {rank=}, {passes=}")
    read = readers(ParameterSet.of(model), wider_than=rank)
    found = {name: LeadingVectors(width(t, m), rank, t.device) for name, (t, m) in read.items()}
    with note_rows({m: found[name] for name, (_, m) in read.items()}, rows), torch.no_grad():
        for _ in range(passes):
            run()
            for one in found.values():
                one.turn()
    for name, one in found.items():
        if not one.num_rows or not one.found.isfinite().all():
            raise UsageError(f"the passes did not read {name!r}, or not as finite numbers, so it has no components.")
    return {name: _subspace(*read[name], one.found) for name, one in found.items()}


def planned_subspaces(tuned: ParameterSet, rank: int) -> dict[str, Subspace]:
    """The subspaces that `principal_subspaces` would find, without their numbers: on `meta`."""
    read = readers(tuned, wider_than=rank)
    return {name: _subspace(t, m, torch.empty(width(t, m), rank, device="meta")) for name, (t, m) in read.items()}


def readers(tuned: ParameterSet, wider_than: int = 0) -> dict[str, tuple[TunedTensor, nn.Module]]:
    """By name the tuned tensors that multiply rows of more numbers than `wider_than`, with the modules that do it."""
    read = ((t, reader_of(t)) for t in tuned)
    return {t.name: (t, m) for t, m in read if m is not None and width(t, m) > wider_than}


def reader_of(tensor: TunedTensor) -> nn.Module | None:
    """The module that multiplies rows by a tensor: a linear layer or a norm; None if another one reads it as well."""
    modules = [module for module, name in tensor.places if name == "weight"]
    if len(modules) < len(tensor.places) or any(isinstance(m, nn.Embedding) for m in modules):
        return None
    module, p = modules[0], tensor.parameter
    is_linear = p.dim() == 2 and (isinstance(module, nn.Linear) or is_transposed(module))
    return module if is_linear or (p.dim() == 1 and is_norm(module)) else None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class, such as LayerNorm or LlamaRMSNorm."""
    return "norm" in type(module).__name__.lower()


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer holds its weight as (inputs, outputs), as GPT-2's do."""
    return type(module).__name__ == "Conv1D"


def width(tensor: TunedTensor, module: nn.Module) -> int:
    """The size of the rows that a tensor multiplies."""
    return tensor.parameter.shape[1 if tensor.parameter.dim() == 2 and not is_transposed(module) else 0]


def _subspace(tensor: TunedTensor, module: nn.Module, vectors: Tensor) -> Subspace:
    is_left = tensor.parameter.dim() == 1 or is_transposed(module)
    return Subspace(0, vectors, None) if is_left else Subspace(0, None, vectors)


class RowSum(Protocol):
    """A sum over rows."""

    def add(self, x: Tensor) -> None:
        """Add rows (rows, n)."""


@contextmanager
def note_rows(sums: Mapping[nn.Module, RowSum], rows: Rows | None) -> Iterator[None]:
    """Within this context, what the weight of each module multiplies in a pass is added to its sum.

    Args:
        sums: by linear layer or norm.
        rows: as in `principal_subspaces`.
    """
    hooks = [module.register_forward_hook(_Note(one, rows)) for module, one in sums.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Note:
    """A hook that adds what a module's weight multiplies in a pass."""

    def __init__(self, one: RowSum, rows: Rows | None) -> None:
        self._one, self._rows, self._is_inside = one, rows, False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._is_inside:  # of the calls below
            return
        self._is_inside = True
        try:
            x = _normalised(module, args) if is_norm(module) else args[0]
        finally:
            self._is_inside = False
        self._one.add((x.reshape(-1, x.shape[-1]) if self._rows is None else self._rows(module, x)).detach())


def _normalised(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """What the gain of a norm multiplies: the output is affine in the gain, however it enters (g, or 1 + g)."""
    gain = module.weight
    assert isinstance(gain, Tensor)
    ends = (functional_call(module, {"weight": torch.full_like(gain, value)}, args) for value in (1.0, 0.0))
    one, zero = ends
    return one - zero  # type: ignore[no-any-return]
