"""Quantised base models: the libraries that quantise them, and which of their tensors are packed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.run import read_recipe
from zotune.llm.config.step import ModelOptions
from zotune.llm.quantized.layers import PackedLinear
from zotune.model.shards import is_distributed, local


def _nf4(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    # Blocks of 64 values with a float32 scale each; scales that are quantised themselves could not be tuned.
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _int8(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_int4(dtype: torch.dtype) -> Any:
    # The int4 format of torchao needs GPU kernels (mslk), and peft cannot add adapters to it; this format holds each
    # 4-bit value in a byte and runs anywhere.
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    return TorchAoConfig(
        IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=PerGroup(32),
        )
    )


QUANTIZERS: dict[str, tuple[str, Callable[[torch.dtype], Any]]] = {
    "bnb-nf4": ("bitsandbytes", _nf4),
    "bnb-int8": ("bitsandbytes", _int8),
    "torchao-int8": ("torchao", _torchao_int8),
    "torchao-int4": ("torchao", _torchao_int4),
}


def check_head(model: nn.Module, options: ModelOptions) -> None:
    """Check that a base model can be given a new classification head.

    Raises:
        UsageError: the base is quantised.
    """
    if is_quantised(model):
        raise UsageError(
            f"the weights of {options.model} are quantised ({options.quantization or 'in its checkpoint'}), and such a "
            "model cannot get a new classification head. Use the task's prompt (--prompt aligned), or no quantization."
        )


def loading_options(name: str | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` quantises a model and places it on its device."""
    if name not in QUANTIZERS:
        return {}
    place = {} if device.type == "cpu" else {"device_map": {"": device}}
    return {"quantization_config": quantization_config(name, dtype), **place}


class _PackedShape(nn.Linear):
    """A packed linear layer on `meta`: its size in memory and the shape of its output."""

    def __init__(self, like: nn.Linear, num_bytes: int) -> None:
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None, device="meta")
        self.weight = nn.Parameter(torch.empty(num_bytes, dtype=torch.uint8, device="meta"), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return an output of the right shape."""
        return input.new_empty((*input.shape[:-1], self.out_features))


def replace_with_packed_shapes(model: Any, name: str) -> None:
    """Give the linear layers of a model on `meta` the size that they have once quantised; the head keeps its size."""
    head = model.get_output_embeddings()
    for path, layer in [(path, m) for path, m in model.named_modules() if type(m) is nn.Linear and m is not head]:
        owner, _, attribute = path.rpartition(".")
        numbers, rows = layer.weight.numel(), layer.out_features
        # Integers, and a float32 scale per block of 64, per row, or per group of 32.
        num_bytes = {"bnb-nf4": numbers // 2 + numbers // 16, "torchao-int4": numbers + numbers // 8}
        setattr(model.get_submodule(owner), attribute, _PackedShape(layer, num_bytes.get(name, numbers + 4 * rows)))


def keep_scales_in_float32(model: nn.Module) -> None:
    """Prevent bitsandbytes from rounding the scales of 4-bit layers to bfloat16 in the first forward pass on a CPU.

    It rounds them for a faster kernel on some CPUs, and would then save other scales than it loaded.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def quantization_config(name: str, dtype: torch.dtype) -> Any:
    """Return the configuration with which transformers quantises a model while loading it.

    Raises:
        UsageError: the library of the quantisation is not installed, or does not work here.
    """
    package, make = QUANTIZERS[name]
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"quantization: {name} needs {package}, which is not installed: pip install {package}")
    try:
        return make(dtype)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise UsageError(f"quantization: {name} does not work with the installed {package}: {error}") from None


def saved_quantization(folder: Path) -> str | None:
    """Return the quantisation of the base model on which the adapter in a run's folder was tuned, or None.

    Raises:
        UsageError: the folder's config.yaml names one that there is not.
    """
    path = folder / "config.yaml"
    name = read_recipe(path).get("quantization") if path.is_file() else None
    known = ("none", "gguf", *QUANTIZERS)
    if name is not None and name not in known:
        raise UsageError(f"{path}: quantization is {str(name)[:80]!r}.{did_you_mean(str(name)[:80], known)}")
    return name


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor holds integers of a quantised format, directly or in its components."""
    return not tensor.is_floating_point() or is_traceable_wrapper_subclass(local(tensor))


def packed_names(model: nn.Module) -> list[str]:
    """Return the names of a model's packed parameters."""
    return [name for name, p in model.named_parameters() if is_packed(p)]


def is_quantised(model: Any) -> bool:
    """Whether any weights of a model are packed."""
    return bool(getattr(model, "is_quantized", False)) or bool(packed_names(model))


def supports_row_lookup(head: nn.Module | None) -> bool:
    """Whether single rows of an output layer can be computed; one with a hook, which may load it, runs as a whole."""
    is_plain = isinstance(head, nn.Linear) and not is_packed(head.weight) and not hasattr(head, "_hf_hook")
    return isinstance(head, PackedLinear) or is_plain


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model that are not tuned, by name; for a quantised base including its layers' buffers."""
    if not packed_names(model):
        return {name: p.data for name, p in model.named_parameters() if not p.requires_grad}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name: p.data for name, p in model.named_parameters() if not p.requires_grad}
    # Tensors of bitsandbytes beside its integers are no parameters, but are saved with them.
    frozen |= {n: t for n, t in model.state_dict().items() if n not in parameters and isinstance(t, Tensor)}
    return {inner: part for name, tensor in frozen.items() for inner, part in _parts(name, tensor)}


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors that a tensor consists of."""
    if is_distributed(tensor) or not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for attribute in tensor.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{attribute}", getattr(tensor, attribute))
