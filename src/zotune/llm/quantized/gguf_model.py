"""Models of GGUF files whose quantised matrices stay packed: no whole matrix is ever dequantised.

The loader of transformers dequantises a whole file. Apart from that, little has to be done: names come from the tables
of the `gguf` package; files of llama interleave the two halves of each head's rotary pairs, and files of gemma store
the gain of a norm where transformers stores its difference to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zotune.errors import UsageError, listed
from zotune.llm.quantized.gguf_blocks import FORMATS
from zotune.llm.quantized.gguf_config import ROPE_FACTORS, complete_config
from zotune.llm.quantized.gguf_reader import StoredTensor, read_gguf
from zotune.llm.quantized.layers import PackedEmbedding, PackedLinear
from zotune.model.layers import stack_of
from zotune.model.mapped_memory import register_memmap, release

# Architectures whose files differ from transformers at most in the order of rows, which can change while packed.
ARCHITECTURES = ("gemma2", "gemma3", "llama", "qwen2", "qwen3")
_NUMBERS = ("F32", "F16", "BF16")


class matrices_on_meta(TorchFunctionMode):  # noqa: N801 - a context manager reads like a verb
    """Within this context new modules have their matrices on `meta`; all other tensors, buffers too, have values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and not isinstance(args[0], int) and len(args[0]) > 1:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def read_model(file: Path, config: Any, dtype: torch.dtype, keep: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Load the causal language model in a GGUF file, in eval mode.

    Args:
        file: the GGUF file.
        config: the model's configuration in transformers.
        dtype: dtype of the computation, and of all tensors that are not packed.
        keep: given each packed matrix, returns it as the model is to hold it; the pages of the file that were read for
            it are then given back. None: each matrix is held as it is.

    Raises:
        UsageError: the architecture, a key or a tensor's format is not supported, or a tensor has no place; the message
            names it.
    """
    import transformers

    stored = read_gguf(file)
    if keep is not None:
        register_memmap(stored.tensors[0].data)
    architecture, by_name = stored.architecture, {tensor.name: tensor for tensor in stored.tensors}
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"{file} holds a model of architecture {architecture!r}; supported GGUF architectures are: "
            f"{', '.join(ARCHITECTURES)}. Convert it to a folder of safetensors, and quantise that (--quantization)."
        )
    factors = by_name.pop(ROPE_FACTORS, None)
    complete_config(config, architecture, stored.keys, None if factors is None else factors.data, str(file))
    # A head in the file is not tied, whatever the configuration says.
    config.tie_word_embeddings = config.tie_word_embeddings and "output.weight" not in by_name
    with matrices_on_meta():
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    names = _stored_names(model, architecture)
    tied = ["output.weight"] if config.tie_word_embeddings else []
    absent = sorted(set(names.values()) - by_name.keys() - set(tied))
    _check_sets(file, absent, sorted(by_name.keys() - names.values()))
    for name, stored_name in names.items():
        if stored_name in by_name:
            _set_tensor(model, name, by_name[stored_name], architecture, config, dtype, keep)
    _tie(model)
    return model.eval()


def _check_sets(file: Path, absent: list[str], unread: list[str]) -> None:
    """Check that the file holds all tensors of the model, and no others.

    Raises:
        UsageError: it does not.
    """
    if absent:
        raise UsageError(f"{file} does not hold {listed(absent)}. Is it a part of a file, or of another architecture?")
    if unread:
        raise UsageError(
            f"{file} holds {listed(unread)}, which the model of its architecture does not read, so it would compute "
            "something else. Convert it to a folder of safetensors, and quantise that (--quantization)."
        )


def _set_tensor(
    model: Any,
    name: str,
    stored: StoredTensor,
    architecture: str,
    config: Any,
    dtype: torch.dtype,
    keep: Callable[[Tensor], Tensor] | None,
) -> None:
    """Give a parameter of the model the values in the file, packed if the file has them so.

    Raises:
        UsageError: the format of the tensor is not supported, or its shape is another.
    """
    from gguf import GGMLQuantizationType, dequantize

    expected = tuple(model.get_parameter(name).shape)
    if stored.shape != expected:
        raise UsageError(
            f"{stored.name} of the GGUF file has the shape {stored.shape}, but by its configuration {expected}."
        )
    is_packed = stored.kind not in _NUMBERS
    content = stored.data if is_packed else dequantize(stored.data, GGMLQuantizationType[stored.kind])
    value = _as_in_transformers(torch.from_numpy(content), stored.name, architecture, config)
    if is_packed:
        source, value = torch.from_numpy(content), value if keep is None else keep(value)
        if keep is not None:
            release(source)
        _pack(model, name, value, stored.kind, dtype)
    else:
        set_in_model(model, name, nn.Parameter(value.to(dtype)))


def _stored_names(model: nn.Module, architecture: str) -> dict[str, str]:
    """Return the names of the model's parameters, and their names in a GGUF file."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (kind,) = (kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, len(stack_of(model)[1]))
    stored_names = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        stored_names[name] = f"{names.get_name(path)}.{attribute}"
    return stored_names


def _as_in_transformers(value: Tensor, name: str, architecture: str, config: Any) -> Tensor:
    """Return a tensor, packed or not, in the row order and convention of transformers."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        # (heads, pairs, 2, …) → (heads, 2, pairs, …)
        return value.view(heads, -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value - 1
    return value


def set_in_model(model: nn.Module, name: str, value: nn.Parameter | nn.Module) -> None:
    """Replace the parameter or module of a model that has this name."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def _pack(model: nn.Module, name: str, blocks: Tensor, kind: str, dtype: torch.dtype) -> None:
    """Replace the layer of this weight by a packed layer."""
    path = name.removesuffix(".weight")
    layer: Any = model.get_submodule(path)
    if kind not in FORMATS or not isinstance(layer, (nn.Linear, nn.Embedding)):
        raise UsageError(
            f"{name} of a {type(layer).__name__} is in the format {kind}, which is not supported; linear layers and "
            f"embeddings may be in {', '.join(FORMATS)}. Use another quantisation of the model."
        )
    weight = nn.Parameter(blocks, requires_grad=False)
    packed: nn.Module
    if isinstance(layer, nn.Embedding):
        packed = PackedEmbedding(weight, FORMATS[kind], dtype, getattr(layer, "embed_scale", None))
    else:
        packed = PackedLinear(weight, FORMATS[kind], dtype, layer.bias)
    set_in_model(model, path, packed)


def _tie(model: Any) -> None:
    """Tie the head to the embedding if the file has one matrix for both."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not model.config.tie_word_embeddings:
        return
    if isinstance(embedding, PackedEmbedding):
        path = next(name for name, m in model.named_modules() if m is head)
        set_in_model(model, path, PackedLinear(embedding.weight, embedding.format, embedding.dtype, None))
    else:
        head.weight = embedding.weight
