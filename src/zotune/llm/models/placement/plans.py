"""Tensor-parallel plans: which matrix of a model is cut along which dimension.

transformers has a plan for most types of models. For some of the others there is one here, in the words of
transformers: `colwise` cuts a layer's outputs, `rowwise` its inputs, `…_gather_output` and `…_split_input` keep the
layer's boundary whole, which layers between need that count on all of it, such as attention over all heads.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from torch import nn

_OPT_LAYER, _GPT2_LAYER = "model.decoder.layers.*", "transformer.h.*"
# Styles of a layer that holds its weight transposed, and their counterparts for linear layers.
_TRANSPOSED = {
    f"conv1d_{name}": name for name in ("colwise", "colwise_gather_output", "rowwise", "rowwise_split_input")
}
WHOLE_BOUNDARIES = ("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep", "replicate")
"""The styles of layers that take and give whole activations."""
_PLANS = {
    "opt": {
        **{f"{_OPT_LAYER}.self_attn.{name}_proj": "colwise_gather_output" for name in ("q", "k", "v")},
        f"{_OPT_LAYER}.self_attn.out_proj": "rowwise_split_input",
        f"{_OPT_LAYER}.fc1": "colwise",
        f"{_OPT_LAYER}.fc2": "rowwise",
        "model.decoder.embed_tokens": "embedding_rowwise",
        "lm_head": "colwise_gather_output",
    },
    "gpt2": {
        f"{_GPT2_LAYER}.attn.c_attn": "conv1d_colwise_gather_output",
        f"{_GPT2_LAYER}.attn.c_proj": "conv1d_rowwise_split_input",
        f"{_GPT2_LAYER}.mlp.c_fc": "conv1d_colwise",
        f"{_GPT2_LAYER}.mlp.c_proj": "conv1d_rowwise",
        "transformer.wte": "embedding_rowwise",
        "lm_head": "colwise_gather_output",
    },
}


def plan_of(model: Any) -> tuple[dict[str, str], bool]:
    """Return a model's plan, empty if there is none, and whether it is one of this module.

    Args:
        model: a model of transformers, on `meta`.
    """
    own = _PLANS.get(model.config.model_type)
    if own is None:
        return dict(getattr(model, "tp_plan", None) or {}), False
    if any(style in _TRANSPOSED for style in own.values()):
        _register_transposed()
    # A class without a head for text has none to cut.
    names = {replace_layer_number(name) for name, _ in model.named_modules()}
    return {name: style for name, style in own.items() if name in names}, True


def style_of(model: Any, path: str) -> str | None:
    """Return how a model that was cut by a plan has cut a layer, in the words for linear ones; None for not at all."""
    style: str | None = model.tp_plan.get(replace_layer_number(path))
    return None if style is None else _TRANSPOSED.get(style, style)


def replace_layer_number(name: str) -> str:
    """Return a name as plans have it.

    >>> replace_layer_number("model.layers.3.mlp.up_proj")
    'model.layers.*.mlp.up_proj'
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


@cache
def _register_transposed() -> None:
    """Let transformers know the styles of Conv1D, whose weight (inputs × outputs) is cut along the other dimension."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel, RowwiseParallel

    def cut(module: nn.Module, name: str, mesh: Any, placement: Any) -> None:
        p = module._parameters[name]
        assert p is not None
        part = distribute_tensor(p, mesh, [placement], src_data_rank=None)
        module._parameters[name] = nn.Parameter(part, requires_grad=p.requires_grad)

    class Columns(ColwiseParallel):  # type: ignore[misc]
        def shard_param(self, module: Any, param: str, mesh: Any) -> None:
            cut(module, param, mesh, Shard(module._parameters[param].dim() - 1))

        def install_forward(self, module: Any, mesh: Any) -> Any:
            module.out_features = module.nf
            return super().install_forward(module, mesh)

    class Rows(RowwiseParallel):  # type: ignore[misc]
        def shard_param(self, module: Any, param: str, mesh: Any) -> None:
            cut(module, param, mesh, Replicate() if param == "bias" else Shard(0))

        def install_forward(self, module: Any, mesh: Any) -> Any:
            module.in_features = module.nx
            return super().install_forward(module, mesh)

    for name, linear in _TRANSPOSED.items():
        style = ALL_PARALLEL_STYLES[linear]
        kind = Columns if isinstance(style, ColwiseParallel) else Rows
        ALL_PARALLEL_STYLES.register(name, kind(input_layouts=style.input_layouts, output_layouts=style.output_layouts))
