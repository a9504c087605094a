r"""The forward gradient (∇f·u) u at the memory of inference: no graph, and u never stored.

Forward-mode differentiation as torch offers it wants all of u beside the weights; doing without is what the paper
(appendix C.1) leaves open. Here a tuned tensor has a tangent only while it is read: see
`zotune.estimate.forward_mode.dual_numbers`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zotune.directions.direction import Direction
from zotune.errors import UsageError
from zotune.estimate.determinism import note_evaluation
from zotune.estimate.estimate import GradientEstimate, averaged
from zotune.estimate.forward_mode.dual_numbers import DualParameters
from zotune.estimate.mesh import Cell
from zotune.estimate.objective import Accumulated, Closure, as_accumulated, as_number, probing, value_and_tangent
from zotune.model.parameters import ParameterSet

# Tangents are linear in u, so a power of two in front of u changes no digit. This one puts those of a language model,
# up to some thousands, in the middle of what float16 can hold; the others are for a model where they leave it.
_SCALE, _LOWER, _HIGHER = 2.0**-6, 2.0**-18, 2.0**6


def forward_gradient(closure: Closure, tuned: ParameterSet, directions: Sequence[Direction]) -> GradientEstimate:
    r"""Exact directional derivatives by forward-mode differentiation: cᵢ = ∇f(x)·uᵢ, ĝ = (1/q) Σ cᵢ uᵢ.

    Unbiased, E[ĝ] = ∇f, with no μ to choose and no difference of losses to round, so that it suits half precision.
    Directions that are confined to blocks are averaged block by block: q is then the number of a block's directions.

    Args:
        closure: returns the loss f as a tensor (no `loss.item()`); it never calls backward.
        tuned: the tuned tensors, x.
        directions: the uᵢ.

    Cost: a direction takes one forward pass that carries tangents along: three matrix products for each one of a plain
    pass, so some 1.4 to 1.9 times the two passes of a central difference. float16 takes a second pass where tangents
    leave its range. Memory: that of inference, with a second tensor beside each activation in use; of u a piece that
    stays in the cache, and of a tensor that is read neither by a linear layer nor by an embedding its part of u
    meanwhile. Attention has a matrix of scores, of some examples at a time.

    Raises:
        UsageError: an operation has no forward-mode derivative, the model is compiled or scripted, or the loss has
            lost its tangent on the way.
        UnreadTensorError: a tuned tensor was not read.

    Source: the paper, section 3 and appendix C.1; Baydin et al., 2022 (arXiv 2202.08587); Ren et al., 2022
    (arXiv 2210.03310).

    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> tuned, u = ParameterSet(model), Direction(seed=7)
    >>> estimate = forward_gradient(lambda: model.weight.pow(3).sum(), tuned, [u])
    >>> (c, _), = estimate.terms
    >>> slope = (3 * model.weight.detach() ** 2 * u.of(model, "weight")).sum()
    >>> abs(c - float(slope)) < 1e-12
    True
    """
    refuse_compiled(tuned.model)
    if tuned.is_tensor_parallel:
        raise UsageError(
            "the modules of this model compute with shards (a tensor-parallel plan) and exchange activations, and what "
            "is exchanged loses its tangent. Use central_difference, which needs none, or shard the model by FSDP2."
        )
    with probing(tuned.model):
        found = _derivatives(closure, tuned, directions)
    terms = averaged([c for _, c, _ in found], directions)
    return GradientEstimate(found[0][0], terms, num_forwards=sum(passes for *_, passes in found))


vars(forward_gradient)["cost"] = 2


def _derivatives(
    closure: Closure, tuned: ParameterSet, directions: Sequence[Direction]
) -> list[tuple[float, float, int]]:
    """f(x), ∇f·u, and how many passes that took: one, or two where the tangents left the range of float16."""
    found = [(value, slope, 1) for value, slope in _duals(closure, tuned, directions, _SCALE)]
    if not _uses_float16(tuned.model):
        return found
    for scale, is_out in ((_HIGHER, lambda slope: slope == 0), (_LOWER, lambda slope: not math.isfinite(slope))):
        again = [i for i, (value, slope, n) in enumerate(found) if n == 1 and math.isfinite(value) and is_out(slope)]
        for i, dual in zip(again, _duals(closure, tuned, [directions[i] for i in again], scale), strict=True):
            found[i] = (*dual, 2)
    return found


def _uses_float16(model: nn.Module) -> bool:
    tensors = list(model.parameters())
    return any(t.dtype == torch.float16 for t in tensors) or any(
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        for kind in {t.device.type for t in tensors} - {"meta"}
    )


def _duals(
    closure: Closure, tuned: ParameterSet, directions: Sequence[Direction], scale: float
) -> list[tuple[float, float]]:
    """f(x) and ∇f·u of each direction, from a pass each whose tangents are those of scale · u."""
    whole = as_accumulated(closure)
    num_parts = len(whole.closures)
    cells = [Cell(part, group, 3) for group in range(len(directions)) for part in range(num_parts)]

    def compute(own: Sequence[int]) -> list[list[float]]:
        # One direction after the other, so that each is made once for all micro-batches.
        return [
            numbers
            for group, u in enumerate(directions)
            if (parts := [whole.closures[cells[k].part] for k in own if cells[k].group == group])
            for numbers in _dual(parts, tuned, u, scale)
        ]

    numbers = whole.mesh.evaluate(cells, compute) if cells else []
    return [_mean(whole, numbers[lo : lo + num_parts], scale) for lo in range(0, len(cells), num_parts)]


def _dual(parts: Sequence[Closure], tuned: ParameterSet, direction: Direction, scale: float) -> list[list[float]]:
    """Each part's value, its tangent along scale · u, and whether it has one."""
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), explained():
        with DualParameters(tuned, direction, scale):
            values = [as_number(part()) for part in parts]
        note_evaluation()
        return [value_and_tangent(value) for value in values]


def _mean(whole: Accumulated, parts: Sequence[Sequence[float]], scale: float) -> tuple[float, float]:
    """f(x) and ∇f·u from the numbers of all parts.

    Raises:
        UsageError: no part's loss has a tangent.
    """
    values, tangents, has_tangent = zip(*parts, strict=True)
    if not any(has_tangent):
        raise UsageError(
            "the closure's loss has no tangent, so how it depends on the weights is unknown to the forward "
            "gradient. Return it as a tensor, with no .item(), float(), .detach() or NumPy on the way. An "
            "objective that has no derivative (accuracy, F1, a reward) wants central_difference."
        )
    return float(whole.mean(values)), float(whole.mean(tangents)) / scale


def refuse_compiled(model: nn.Module) -> None:
    """Refuse modules whose code reads the weights where tangents do not reach it.

    Raises:
        UsageError: a module is compiled or scripted.
    """
    for name, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        if scripted or "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise UsageError(
                f"the module {name or type(module).__name__!r} is {'scripted' if scripted else 'compiled'}: compiled "
                "code reads the weights where their tangents do not reach it. Give the forward gradient the model "
                "as it was before torch.compile or torch.jit."
            )


_WITHOUT_RULE = re.compile(r"forward AD with (\w+)")


@contextmanager
def explained() -> Iterator[None]:
    """An operation without a forward-mode derivative is reported by name, with what to do."""
    try:
        yield
    except NotImplementedError as error:
        named = _WITHOUT_RULE.search(str(error))
        if named is None and "jvp function" not in str(error):
            raise
        what = f"torch's {named[1]}" if named else f"the autograd function {_custom_function(error)} (no jvp method)"
        raise UsageError(
            f"{what} has no forward-mode derivative, so the forward gradient cannot pass it. Compute the same with "
            "operations that have one, or tune only what comes after it, or use central_difference, which needs none."
        ) from error


def _custom_function(error: BaseException) -> str:
    """The name of the torch.autograd.Function that raised an error."""
    trace, name = error.__traceback__, "in use"
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("cls")
        name = owner.__name__ if isinstance(owner, type) and issubclass(owner, torch.autograd.Function) else name
        trace = trace.tb_next
    return name
