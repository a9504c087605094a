"""What is tuned of a model whose base stays in a GGUF file, as a folder: the tuned tensors, and the base's name.

transformers writes no packed GGUF model, and to write all numbers of one would take what its file was to save.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from zotune.errors import UsageError
from zotune.llm.quantized.scales import SCALES, add_scales

FILE = "tuned_model.safetensors"


def write_tuned(model: Any, folder: Path) -> None:
    """Write the parameters that require a gradient, and what they were tuned on."""
    tuned = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    # One key: the order of several is not the same each time, and a run's files are.
    save_file(tuned, folder / FILE, {"base_model": str(model.name_or_path)})


def base_of_tuned(folder: Path) -> str | None:
    """The name of the model that a folder's tensors were tuned on; None where there are none.

    Raises:
        UsageError: they cannot be read.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            return str(file.metadata()["base_model"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / FILE} cannot be read: {error}") from None


@torch.no_grad()
def put_tuned(model: nn.Module, folder: Path) -> None:
    """Put a folder's tensors into its base model.

    Raises:
        UsageError: the base has no such tensors.
    """
    with safe_open(folder / FILE, framework="pt") as file:
        tuned = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    try:
        suffix = f".{SCALES}"
        layers = [name.removesuffix(suffix) for name in tuned if name.endswith(suffix)]
        # A tensor that is tied is saved once, under its first name.
        add_scales(_with_ties(model, {name: model.get_submodule(name) for name in layers}))
        for name, value in tuned.items():
            model.get_parameter(name).copy_(value)
    except (AttributeError, RuntimeError) as error:
        raise UsageError(f"{folder / FILE} is of another base model: {error}") from None


def _with_ties(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """These layers, and those that share their blocks."""
    blocks = {id(layer.weight) for layer in layers.values()}
    return {name: m for name, m in model.named_modules() if id(m._parameters.get("weight")) in blocks}
