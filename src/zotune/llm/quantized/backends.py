"""Quantised bases: which libraries make them, what of them is packed, and what is written of what is tuned on them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zotune.errors import UsageError
from zotune.llm.config.run import ModelOptions, read_recipe
from zotune.llm.models.builtin import BUILT_IN
from zotune.llm.quantized.layers import PackedLinear


def _nf4(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    # Blocks of 64 numbers with a float32 scale each; scales that are quantised in turn could not be tuned.
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _int8(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_int4(dtype: torch.dtype) -> Any:
    # torchao's int4 proper needs a GPU's kernels (mslk), and peft puts no adapter on it; this one holds each number of
    # four bits in a byte, and runs anywhere.
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    return TorchAoConfig(
        IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=PerGroup(32),
        )
    )


_CONFIGS: dict[str, tuple[str, Callable[[torch.dtype], Any]]] = {
    "bnb-nf4": ("bitsandbytes", _nf4),
    "bnb-int8": ("bitsandbytes", _int8),
    "torchao-int8": ("torchao", _torchao_int8),
    "torchao-int4": ("torchao", _torchao_int4),
}


def check_quantization(options: ModelOptions) -> None:
    """Refuse a quantisation that the model cannot be had in.

    Raises:
        UsageError: with what can be done.
    """
    name, model = options.quantization, options.model
    is_file = model.endswith(".gguf")
    if is_file and name not in (None, "gguf"):
        raise UsageError(f"{model} is packed as it comes; leave out --quantization {name}.")
    if name == "gguf" and not is_file and model not in BUILT_IN and not Path(model).is_dir():
        raise UsageError(
            f"quantization: gguf takes a built-in model or the path of a GGUF file, not {model!r}. Of other models "
            f"there are: {', '.join(_CONFIGS)}."
        )
    if name in _CONFIGS and model.startswith("random:"):
        raise UsageError(f"{model} is in no file that {_CONFIGS[name][0]} could quantise; leave out --quantization.")


def check_head(model: nn.Module, options: ModelOptions) -> None:
    """Refuse to put a new head on a base that is packed.

    Raises:
        UsageError: it is.
    """
    if is_quantised(model):
        raise UsageError(
            f"quantization: {options.quantization or 'as it comes'} leaves {options.model} packed, and no "
            "classification head is put on such a model. Use the task's prompt (--prompt aligned), or no quantization."
        )


def quantised_on_load(name: str | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told so that it quantises a model, and puts it where it computes."""
    if name not in _CONFIGS:
        return {}
    place = {} if device.type == "cpu" else {"device_map": {"": device}}
    return {"quantization_config": config_for(name, dtype), **place}


class _Shape(nn.Linear):
    """A packed linear layer on `meta`: what it takes, and the shape of what it gives."""

    def __init__(self, like: nn.Linear, num_bytes: int) -> None:
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None, device="meta")
        self.weight = nn.Parameter(torch.empty(num_bytes, dtype=torch.uint8, device="meta"), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """As the layer's."""
        return input.new_empty((*input.shape[:-1], self.out_features))


def put_shapes(model: Any, name: str) -> None:
    """Let a model on `meta` take what it would when it is quantised; the head stays as it is."""
    head = model.get_output_embeddings()
    for path, layer in [(path, m) for path, m in model.named_modules() if type(m) is nn.Linear and m is not head]:
        owner, _, attribute = path.rpartition(".")
        numbers, rows = layer.weight.numel(), layer.out_features
        # Integers, and a float32 scale for each block of 64, each row, or each group of 32.
        num_bytes = {"bnb-nf4": numbers // 2 + numbers // 16, "torchao-int4": numbers + numbers // 8}
        setattr(model.get_submodule(owner), attribute, _Shape(layer, num_bytes.get(name, numbers + 4 * rows)))


def keep_scales(model: nn.Module) -> None:
    """Keep bitsandbytes from rounding the scales of 4-bit layers to bfloat16 at their first forward pass on a CPU.

    It does so for a faster kernel on CPUs that have one, and what it then saves is not what was loaded.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def config_for(name: str, dtype: torch.dtype) -> Any:
    """The configuration with which transformers quantises a model when it loads it.

    Raises:
        UsageError: the library that does it is not here, or does not work here.
    """
    package, make = _CONFIGS[name]
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"quantization: {name} needs {package}, which is not installed: pip install {package}")
    try:
        return make(dtype)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise UsageError(f"quantization: {name} does not work with the {package} installed here: {error}") from None


def saved_quantization(folder: Path) -> str | None:
    """How the base of an adapter in a run's folder was quantised."""
    path = folder / "config.yaml"
    found = read_recipe(path).get("quantization") if path.is_file() else None
    return None if found is None else str(found)


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor holds integers of a quantised format, itself or within."""
    return not tensor.is_floating_point() or is_traceable_wrapper_subclass(tensor)


def packed_names(model: nn.Module) -> list[str]:
    """The parameters of a model that are packed; none if it is not quantised."""
    return [name for name, p in model.named_parameters() if is_packed(p)]


def is_quantised(model: Any) -> bool:
    """Whether some of a model's weights are packed."""
    return bool(getattr(model, "is_quantized", False)) or bool(packed_names(model))


def gives_rows(head: nn.Module | None) -> bool:
    """Whether single rows of an output layer can be had."""
    return isinstance(head, PackedLinear) or (isinstance(head, nn.Linear) and not is_packed(head.weight))


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that a model computes with and that is not tuned, by name; of a quantised base all that its layers hold."""
    if not packed_names(model):
        return {name: p.data for name, p in model.named_parameters() if not p.requires_grad}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {name: p.data for name, p in model.named_parameters() if not p.requires_grad}
    # What bitsandbytes keeps beside its integers is no parameter, but is saved with them.
    found |= {n: t for n, t in model.state_dict().items() if n not in parameters and isinstance(t, Tensor)}
    return {inner: part for name, tensor in found.items() for inner, part in _parts(name, tensor)}


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for attribute in tensor.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{attribute}", getattr(tensor, attribute))
