"""The paper's formulas of peak memory, and the sizes of a model that they are about.

Peak memory is that of the weights, of the optimizer's state, and of what computing an estimate or a gradient takes for
a moment: |x| + state + dynamic (the paper, table 5 and appendix C.1; tables A1 and A2 write the same for full tuning
and for an adapter of ε numbers). Sizes are bytes in the precision of the model. A layer l is one of its stack, or all
that lies around it. Activations a are what autograd keeps for the backward pass, each tensor once, weights not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zotune.llm.encoding import collate
from zotune.llm.live_memory import Assumed, _fused_attention
from zotune.llm.models import LanguageModel
from zotune.llm.objective import OBJECTIVES
from zotune.llm.skeleton import skeleton
from zotune.llm.tuning import prepare
from zotune.llm.workload import Workload, made_up
from zotune.stack import stack_of


@dataclass(frozen=True)
class Sizes:
    """Bytes.

    Attributes:
        x: all weights. g: the tuned ones, which is how large a gradient is; g_l by layer.
        a_l: activations by layer.
    """

    x: int
    g_l: tuple[int, ...]
    a_l: tuple[int, ...]

    @property
    def g(self) -> int:
        """The tuned weights."""
        return sum(self.g_l)

    @property
    def backward(self) -> int:
        """Σ_l max(a_l, g_l): a layer's activations make room for its gradient."""
        return sum(map(max, self.a_l, self.g_l))

    @property
    def mixed(self) -> float:
        """The same in mixed precision: half the activations, beside a copy of the weights of half their size."""
        halved = (max(a / 2, g) for a, g in zip(self.a_l, self.g_l, strict=True))
        return max(sum(self.a_l) / 2 + self.x / 2, sum(halved))


FORMULAS: dict[str, Callable[[Sizes], float]] = {
    "fo_sgd": lambda s: s.x + s.backward,
    "fo_adam": lambda s: s.x + s.backward + 3 * s.g,
    "fo_adam_single": lambda s: s.x + s.backward + 2 * s.g,
    "fo_sgd_mixed": lambda s: s.x + s.mixed,
    "fo_adam_mixed": lambda s: s.x + s.mixed + 3 * s.g,
    "forward_grad": lambda s: s.x + s.g + max(s.a_l),
    "zo_sgd_vanilla": lambda s: s.x + s.g,
    "zo_sgd": lambda s: s.x + max(s.g_l),
    "zo_sgd_sign": lambda s: s.x + max(s.g_l),
    "zo_sgd_cons": lambda s: s.x + max(s.g_l),
    "zo_sgd_mmt": lambda s: s.x + max(s.g_l) + s.g,
    "zo_adam": lambda s: s.x + max(s.g_l) + 2 * s.g,
}
"""Peak bytes by the paper, for a method by name; `_single`, `_mixed` and `_vanilla` are its variants."""


def sizes_of(workload: Workload) -> Sizes:
    """The sizes of a model, tuned as the workload says, on its batch; found without weights, on the `meta` device.

    Raises:
        UsageError: the model cannot be found, or tuned like that.
    """
    lm, _ = skeleton(workload)
    prepare(lm, workload)
    path, layers = stack_of(lm.module)
    activations = [0] * (len(layers) + 1)
    with Assumed(), _fused_attention(), _counting(lm.module, layers, activations):
        _forward(lm, workload)
    tuned = [0] * (len(layers) + 1)
    weights = dict(lm.module.named_parameters())
    for name, p in weights.items():
        inside = name.startswith(f"{path}.") if path else False
        layer = int(name[len(path) + 1 :].split(".")[0]) if inside else len(layers)
        tuned[layer] += p.nbytes if p.requires_grad else 0
    return Sizes(sum(p.nbytes for p in weights.values()), tuple(tuned), tuple(activations))


def _forward(lm: LanguageModel, workload: Workload) -> None:
    """A forward pass as the objective has it: logits of the candidates' tokens, or the normaliser of all."""
    objective, examples = OBJECTIVES[workload.objective], made_up(workload, lm)
    one = examples[: workload.per_device_train_batch_size]
    batch = collate(one, lm.pad_token_id, torch.device("cpu"), exact=objective.exact)
    ids, mask, positions = (t.to("meta") for t in (batch.input_ids, batch.attention_mask, batch.positions))
    there = replace(batch, input_ids=ids, attention_mask=mask, positions=positions)
    if lm.classifies or not batch.needs_only_candidates:
        lm.logits(there).float().logsumexp(dim=-1)
    else:
        lm.logits(there, batch.distinct[0].to("meta")).float()


@contextmanager
def _counting(module: nn.Module, layers: list[nn.Module], found: list[int]) -> Iterator[None]:
    """Add the bytes that autograd keeps within this context to the layer in which it keeps them, else to the last."""
    now, known = len(layers), {p.untyped_storage()._cdata for p in module.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            known.add(tensor.untyped_storage()._cdata)
            kept.append(tensor)  # lest its storage's place be taken by another
            found[now] += tensor.untyped_storage().nbytes()
        return tensor

    def enter(index: int) -> Callable[..., None]:
        def set_now(*args: Any) -> None:
            nonlocal now
            now = index

        return set_now

    handles = [layer.register_forward_pre_hook(enter(i)) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(enter(len(layers))) for layer in layers]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
    finally:
        for handle in handles:
            handle.remove()
