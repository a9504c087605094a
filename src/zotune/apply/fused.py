"""Momentum's and Adam's steps in one pass over weights and state, where the processor's kernels are in C.

ĝ is made tile by tile and goes through the transform before it leaves the first-level cache. Every operation is
rounded as in `zotune.apply.transforms`, so the bits are the same, state included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune import noise
from zotune.apply.tensor_update import TensorUpdate
from zotune.apply.transforms import State, adam, adamm, amsgrad, momentum
from zotune.directions.direction import one_pass

_MOMENTS = ("exp_avg", "exp_avg_sq")
# By transform: its number in the kernel, and the tensors of its state.
_RULES: dict[Callable[..., Any], tuple[int, tuple[str, ...]]] = {
    momentum: (0, ("momentum_buffer",)),
    adam: (1, _MOMENTS),
    adamm: (2, _MOMENTS),
    amsgrad: (3, (*_MOMENTS, "max_exp_avg_sq")),
}


def fused_update_(update: TensorUpdate, x: Tensor, state: State, start: int, scale: float) -> State | None:
    """As `zotune.apply.update.update_slice_`; returns None, with nothing done, where no kernel serves the update."""
    transform, terms = update.transform, one_pass(update.terms, update.tensor.id)
    if not isinstance(transform, partial) or transform.func not in _RULES or terms is None:
        return None
    rule, names = _RULES[transform.func]
    states = [state[n] if state else torch.empty(x.numel(), dtype=torch.float32, device=x.device) for n in names]
    if update.history is not None or not noise.has_steps(x) or not all(s.is_contiguous() for s in states):
        return None
    t = state.get("step", 0) + 1
    constants = _constants(transform.keywords, t, 1 - update.lr * update.weight_decay, scale * update.lr)
    place = (terms, update.rounding_seed, update.tensor.id, start)
    noise.step(x, states, rule, constants, *place, first=not state, writes=bool(scale))
    after: State = dict(zip(names, states, strict=True))
    return after if transform.func is momentum else {**after, "step": t}


def _constants(options: dict[str, float], t: int, keep: float, rate: float) -> Any:
    """The step's constants in the kernel's order, in single precision: torch rounds plain factors of tensors alike."""
    beta1, beta2 = options.get("beta1", options.get("beta", 0.0)), options.get("beta2", 0.0)
    averages = (beta1, 1 - beta1, beta2, 1 - beta2, 1 - beta1**t, 1 - beta2**t)
    return np.array([*averages, options.get("eps", 0.0), keep, rate], dtype=np.float32)
