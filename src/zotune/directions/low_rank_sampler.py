r"""Directions of low rank for a whole run: how often the right factor is drawn anew.

Source: Chen et al., 2024, "Enhancing zeroth-order fine-tuning for language models with low-rank structures" (LOZO,
arXiv 2410.07698); Sarkar et al., 2025, "Evolution strategies at the hyperscale" (EGGROLL, arXiv 2511.16652).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zotune.directions.direction import Sampler
from zotune.directions.low_rank import RIGHT, Factored
from zotune.directions.schedule import Renewed, Weights
from zotune.errors import UsageError
from zotune.model.parameters import TunedTensor, TunedTensors
from zotune.noise import derive_seed


@dataclass(frozen=True)
class LowRank(Renewed):
    """A sampler of directions of low rank whose right factor is renewed as a run goes on; see `low_rank`."""

    base: Sampler
    rank: int
    interval: int

    def at(
        self, tuned: TunedTensors, seed: int, step: int, before: Any = None, weights: Weights = TunedTensor.storage
    ) -> Factored:
        """As `Renewed.at`."""
        right_seed = None if self.interval == 1 else derive_seed(seed, step // self.interval, 0, RIGHT)
        return self._factored(tuned, right_seed)

    def restored(self, tuned: TunedTensors, seed: int, state: dict[str, Any]) -> Factored:
        """As `Renewed.restored`."""
        return self._factored(tuned, state["right_seed"])

    @property
    def constants(self) -> dict[str, Any]:
        """As `Renewed.constants`."""
        return {"rank": self.rank, "interval": self.interval}

    def _factored(self, tuned: TunedTensors, right_seed: int | None) -> Factored:
        shapes = {t.id: t.parameter.shape for t in tuned if t.parameter.dim() > 1 and t.parameter.numel()}
        return Factored(self.base, self.rank, right_seed, {i: (s[0], s[1:].numel()) for i, s in shapes.items()})


def low_rank(base: Sampler, rank: int = 1, *, interval: int = 1) -> LowRank:
    r"""Directions that are matrices of low rank: for an m × n tensor U = A Bᵀ/√r, known by (m + n) r numbers.

    A (m × r) is drawn anew for each direction, B (n × r) with it or once for some steps. Independent entries of mean 0
    and variance 1 give E[u uᵀ] = I, so E[ĝ] = ∇f as for any sampler. A linear layer is displaced by two thin products,
    y = x Wᵀ + a (x B) Aᵀ/√r, and no weight is written or copied: probes cost hardly more than their forward passes, and
    many of them (`most` of `zotune.batched`) share the product x Wᵀ.

    Args:
        base: the distribution of the entries of A and B: `gaussian` as in LOZO and EGGROLL, or `rademacher`. Tensors
            of fewer than two dimensions (biases, gains of norms) get its directions as they are. A tensor of more than
            two dimensions counts as a matrix of shape[0] rows.
        rank: r ≥ 1.
        interval: ν ≥ 1, steps between two draws of B. With 1 each direction has its own B (EGGROLL); with more, all
            directions of ν steps share one, so that these steps move a matrix by one of rank at most r (LOZO).

    Raises:
        UsageError: a value is out of range, or the base is no sampler of independent entries.

    Memory: the factors of one tensor. Where a matrix is read by something other than a linear layer or an embedding,
    that tensor, as with other samplers.

    Source: Chen et al., 2024 (LOZO, arXiv 2410.07698), who move probes by A Bᵀ and divide the update by r, where here
    both have 1/√r; Sarkar et al., 2025 (EGGROLL, arXiv 2511.16652).

    >>> import torch
    >>> import zotune as zo
    >>> model = torch.nn.Linear(30, 20)
    >>> opt = zo.zo_sgd(model, lr=0.1, sampler=zo.low_rank(zo.gaussian, rank=2, interval=50))
    >>> (u,) = opt.directions()
    >>> int(torch.linalg.matrix_rank(u.of(model, "weight")))
    2
    """
    if isinstance(base, Renewed):
        raise UsageError(
            f"the factors' entries must be independent, got {base!r}; zotune.sparse(zotune.low_rank(…), …) masks the "
            "matrix that they make."
        )
    if rank < 1:
        raise UsageError(f"a matrix that is not zero has a rank of at least 1, got {rank=}")
    if interval < 1:
        raise UsageError(f"a factor serves at least one step, got {interval=}")
    return LowRank(base, rank, interval)
