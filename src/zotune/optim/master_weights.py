"""First-order steps of weights in half precision, taken by float32 copies of them: the master weights.

A gradient step is small beside a weight: of a bfloat16 weight it is lost unless it exceeds 1/512 of it. So the copies
take the steps and the weights are the copies rounded to nearest, as in mixed-precision training (Micikevicius et al.,
2018; the paper, appendix C.2, FP16). Gradients are summed over micro-batches in float32. Those that float16 would
round to zero are lifted by a scale of the loss, a power of two, which falls while gradients overflow.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from zotune.apply.update import read_changed_
from zotune.errors import UsageError

HALF = (torch.bfloat16, torch.float16)
# Those of torch.amp.GradScaler: the first scale, and the steps without overflow after which it doubles.
_FIRST_SCALE, _GROWTH_STEPS = 2.0**16, 2000


class MasterWeights:
    """A first-order optimizer over float32 copies of its half-precision parameters.

    Args:
        optimizer: any torch optimizer that has not taken a step. From now on its groups hold the copies; schedulers of
            its learning rate go on working.

    Attributes:
        optimizer: that optimizer.
        parameters: the parameters of the model, in the order of the groups.
        scale: the factor of the loss in `backward`, which gradients are freed from; 1 without float16 parameters.

    Raises:
        UsageError: the optimizer has a state, which belongs to the parameters without copies.

    >>> x = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    >>> master = MasterWeights(torch.optim.SGD([x], lr=1e-3))  # below half a unit of bfloat16
    >>> for _ in range(10):
    ...     master.backward(x.sum())
    ...     master.step()
    ...     master.zero_grad()
    >>> x.item()
    0.98828125
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer.state:
            raise UsageError(
                "the optimizer has taken steps on half-precision weights already; give a new one, which has no state."
            )
        self.optimizer = optimizer
        self.parameters: list[Tensor] = _parameters_in(optimizer)
        self._masters = [p.detach().float() if p.dtype in HALF else p for p in self.parameters]
        masters = dict(zip(map(id, self.parameters), self._masters, strict=True))
        for group in optimizer.param_groups:
            group["params"] = [masters[id(p)] for p in group["params"]]
        self._pairs = [(p, m) for p, m in zip(self.parameters, self._masters, strict=True) if m is not p]
        self._versions: list[int] | None = [p._version for p, _ in self._pairs]
        self.scale = _FIRST_SCALE if any(p.dtype == torch.float16 for p in self.parameters) else 1.0
        self._steps_in_range = 0
        me = weakref.ref(self)  # the parameters live longer
        for p, master in self._pairs:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p, m=master: _collect(me(), p, m))  # type: ignore[no-untyped-call]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer, over the copies."""
        return self.optimizer.param_groups

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """The optimizer's state of each parameter of the model, with its copy as `master`."""
        every = zip(self.parameters, self._masters, strict=True)
        return {p: {**self.optimizer.state.get(m, {}), **({} if m is p else {"master": m})} for p, m in every}

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to those of the copies."""
        (loss if self.scale == 1 else loss * self.scale).backward()  # type: ignore[no-untyped-call]

    def lower_scale(self) -> bool:
        """Whether gradients left the range of float16 and are to be computed again, with half the scale from now on."""
        if self.scale == 1 or finite_gradients(self):
            return False
        self.scale, self._steps_in_range = self.scale / 2, 0
        self.zero_grad()
        return True

    def zero_grad(self) -> None:
        """Free the gradients of parameters and copies."""
        for tensor in chain(self.parameters, self._masters):
            tensor.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Let the optimizer move the copies, and round them to the parameters."""
        self._read_changed()
        for p, master in self._pairs:
            if p.grad is not None:  # it did not require a gradient when this object was made
                _collect(self, p, master)
        self.optimizer.step()
        for p, master in self._pairs:
            p.copy_(master)
        self._versions = [p._version for p, _ in self._pairs]
        if self.scale != 1:
            self._steps_in_range += 1
            if self._steps_in_range == _GROWTH_STEPS:
                self.scale, self._steps_in_range = 2 * self.scale, 0

    def _read_changed(self) -> None:
        """Read parameters that were changed since the last step, for instance loaded; others keep their copies."""
        versions = [p._version for p, _ in self._pairs]
        if versions == self._versions:
            return
        for p, master in self._pairs:
            read_changed_(master, p)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, the copies and the scale."""
        scale = {"scale": self.scale, "steps_in_range": self._steps_in_range}
        return {"optimizer": self.optimizer.state_dict(), "masters": [m for _, m in self._pairs], **scale}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, once the parameters are those of that moment, too.

        Raises:
            UsageError: the state was saved without copies, or with copies of other parameters.
        """
        masters = state_dict.get("masters")
        if masters is None or [m.shape for m in masters] != [m.shape for _, m in self._pairs]:
            raise UsageError(
                "the saved state of the optimizer has no float32 copies of these half-precision weights: an earlier "
                "version of zotune or another model wrote it. Start again from the base model."
            )
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for (_, ours), theirs in zip(self._pairs, masters, strict=True):
            ours.copy_(theirs)
        self.scale, self._steps_in_range = state_dict["scale"], state_dict["steps_in_range"]
        self._versions = None


FirstOrder = torch.optim.Optimizer | MasterWeights


def with_master_weights(optimizer: FirstOrder) -> FirstOrder:
    """Wrap an optimizer that tunes parameters in half precision; return any other one as it is."""
    is_plain = isinstance(optimizer, MasterWeights) or all(p.dtype not in HALF for p in _parameters_in(optimizer))
    return optimizer if is_plain else MasterWeights(optimizer)  # type: ignore[arg-type]


def parameters_of(optimizer: FirstOrder) -> list[Tensor]:
    """Return the parameters of the model that an optimizer tunes."""
    return optimizer.parameters if isinstance(optimizer, MasterWeights) else _parameters_in(optimizer)


def inner(optimizer: FirstOrder) -> torch.optim.Optimizer:
    """Return the torch optimizer that holds the moments: of the copies, where there are any."""
    return optimizer.optimizer if isinstance(optimizer, MasterWeights) else optimizer


def written_by_step(optimizer: FirstOrder) -> list[Tensor]:
    """Return the tensors that the next step writes: those with a gradient, and the parameters that copies round to."""
    moved = [p for p in _parameters_in(optimizer) if p.grad is not None]
    return [*moved, *(p for p, _ in optimizer._pairs)] if isinstance(optimizer, MasterWeights) else moved


def back_propagate(optimizer: FirstOrder, loss: Tensor) -> None:
    """Add the gradient of a loss to those that the optimizer's next step reads."""
    if isinstance(optimizer, MasterWeights):
        optimizer.backward(loss)
    else:
        loss.backward()  # type: ignore[no-untyped-call]


def must_repeat(optimizer: FirstOrder) -> bool:
    """Whether the gradients overflowed with the scale of the loss, so that they must be computed again."""
    return isinstance(optimizer, MasterWeights) and optimizer.lower_scale()


def finite_gradients(optimizer: FirstOrder) -> bool:
    """Whether all gradients that the next step would read are finite."""
    gradients: Iterable[Tensor | None] = (p.grad for group in optimizer.param_groups for p in group["params"])
    # The largest magnitude, which takes no memory; it is NaN if one of them is.
    return all(bool(torch.linalg.vector_norm(g, math.inf).isfinite()) for g in gradients if g is not None and g.numel())


def _parameters_in(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def _collect(owner: MasterWeights | None, p: Tensor, master: Tensor) -> None:
    """Add a parameter's gradient to that of its copy, in float32 and without the scale, and free it."""
    if owner is None or p.grad is None:
        return
    gradient = p.grad.float()
    if owner.scale != 1:
        gradient /= owner.scale
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    p.grad = None
