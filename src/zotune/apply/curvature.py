"""A transform of the noise itself: of Σ cᵢ zᵢ and Σ κᵢ zᵢ², where a direction is noise z scaled element by element.

Where the scale is the transform's own state, as HiZOO's H is, a step needs the noise and not the direction that the
probes had: the state has moved in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune import noise
from zotune.apply.transforms import State
from zotune.directions.direction import Terms
from zotune.directions.scaled import base_of

# Σ cᵢ zᵢ, Σ κᵢ zᵢ² and the state of some elements to their step and new state; element-wise.
Rule = Callable[[Tensor, Tensor, State], tuple[Tensor, State]]


@dataclass(frozen=True)
class OfNoise:
    """A transform by a rule for the noise of directions and the scalars of an estimate, one κ for each direction."""

    rule: Rule


def sums_of_noise(
    terms: Terms, scalars: Sequence[float], tensor_id: int, start: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ cᵢ zᵢ and (1/q) Σ κᵢ zᵢ² for the elements of a slice, in the order of the terms."""
    dtype = noise.compute_dtype(like.dtype)
    z = torch.empty(like.numel(), dtype=torch.float32, device=like.device)
    linear, squared = (torch.zeros(like.numel(), dtype=dtype, device=like.device) for _ in range(2))
    for (c, u), curvature in zip(terms, scalars, strict=True):
        base_of(u.sampler_of(tensor_id)).fill(z, u.seed, tensor_id, start)
        own = z.to(dtype)
        linear += own * torch.tensor(c, dtype=dtype, device=like.device)
        squared += own * own * torch.tensor(curvature / len(terms), dtype=dtype, device=like.device)
    return linear, squared
