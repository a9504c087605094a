"""Models of GGUF files, whose quantised matrices stay packed: no matrix of them ever exists as numbers as a whole.

transformers makes numbers of a whole file when it loads one. What it does besides is little: names are those of the
`gguf` package's tables; llama's files keep the two halves of each head's rotary pairs interleaved, and gemma's the gain
of a norm itself in place of what it differs from 1 by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zotune.errors import UsageError
from zotune.llm.quantized.block_formats import FORMATS
from zotune.llm.quantized.gguf_reader import read_file
from zotune.llm.quantized.layers import PackedEmbedding, PackedLinear
from zotune.model.layers import stack_of

# Whose files differ from transformers' in no more than whole rows, which can be put in order while packed.
ARCHITECTURES = ("gemma2", "gemma3", "llama", "qwen2", "qwen3")
_NUMBERS = ("F32", "F16", "BF16")


class matrices_on_meta(TorchFunctionMode):  # noqa: N801 - a context manager reads like a verb
    """Within this context modules are made with matrices on `meta`; all else, buffers too, has its numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and not isinstance(args[0], int) and len(args[0]) > 1:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def read_model(file: Path, config: Any, dtype: torch.dtype) -> Any:
    """The causal language model in a GGUF file, in eval mode.

    Args:
        file: the file.
        config: its configuration, as transformers has it.
        dtype: of what is computed, and of all that is not packed.

    Raises:
        UsageError: it is of an architecture or in a format that cannot be had packed.
    """
    import transformers
    from gguf import GGMLQuantizationType, dequantize

    architecture, tensors = read_file(file)
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"{file} holds a model of architecture {architecture!r}; packed, these can be had: "
            f"{', '.join(ARCHITECTURES)}. Convert it to a folder of safetensors, and quantise that (--quantization)."
        )
    with matrices_on_meta():
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    by_name = {stored.name: stored for stored in tensors}
    for name, stored_name in _stored_names(model, architecture).items():
        stored = by_name.get(stored_name)
        if stored is None:  # a head that is tied to the embedding; anything else is found missing below
            continue
        is_packed = stored.kind not in _NUMBERS
        content = stored.data if is_packed else dequantize(stored.data, GGMLQuantizationType[stored.kind])
        value = _as_in_transformers(torch.from_numpy(content), stored_name, architecture, config)
        if is_packed:
            _pack(model, name, value, stored.kind, dtype)
        else:
            put(model, name, nn.Parameter(value.to(dtype)))
    _tie(model)
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise UsageError(f"{file} does not hold {missing[0]} ({len(missing)} missing in all): another architecture?")
    return model.eval()


def _stored_names(model: nn.Module, architecture: str) -> dict[str, str]:
    """The names of the model's parameters, and under which a file has them."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (kind,) = (kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, len(stack_of(model)[1]))
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        found[name] = f"{names.get_name(path)}.{attribute}"
    return found


def _as_in_transformers(value: Tensor, name: str, architecture: str, config: Any) -> Tensor:
    """A tensor, packed or not, in the order and the convention of transformers."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        # (heads, pairs, 2, …) → (heads, 2, pairs, …)
        return value.view(heads, -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value - 1
    return value


def put(model: nn.Module, name: str, value: nn.Parameter | nn.Module) -> None:
    """Let a model have this parameter or module under a name that it has."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def _pack(model: nn.Module, name: str, blocks: Tensor, kind: str, dtype: torch.dtype) -> None:
    """Put a packed layer in the place of the one that has this weight."""
    path = name.removesuffix(".weight")
    layer: Any = model.get_submodule(path)
    if kind not in FORMATS or not isinstance(layer, (nn.Linear, nn.Embedding)):
        raise UsageError(
            f"{name} is in the format {kind}, as {type(layer).__name__}; packed, linear layers and embeddings can be "
            f"had in {', '.join(FORMATS)}. Take another quantisation of the model."
        )
    own = nn.Parameter(blocks, requires_grad=False)
    packed: nn.Module
    if isinstance(layer, nn.Embedding):
        packed = PackedEmbedding(own, FORMATS[kind], dtype, getattr(layer, "embed_scale", None))
    else:
        packed = PackedLinear(own, FORMATS[kind], dtype, layer.bias)
    put(model, path, packed)


def _tie(model: Any) -> None:
    """Let the head read the embedding's matrix, where the file has but one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not model.config.tie_word_embeddings:
        return
    if isinstance(embedding, PackedEmbedding):
        path = next(name for name, m in model.named_modules() if m is head)
        put(model, path, PackedLinear(embedding.weight, embedding.format, embedding.dtype, None))
    else:
        head.weight = embedding.weight
