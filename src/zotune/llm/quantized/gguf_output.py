"""The output folder of a model with a GGUF base: the tuned tensors, and the name of the base.

transformers cannot write packed GGUF models, and writing dequantised weights would need the space that the file saves.
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

TUNED_FILE = "tuned_model.safetensors"


def write_tuned(model: Any, folder: Path) -> None:
    """Write the parameters that require a gradient, and the name of their base model."""
    tuned = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    # A single key, because the order of several keys varies, and the files of a run must not.
    save_file(tuned, folder / TUNED_FILE, {"base_model": str(model.name_or_path)})


def tuned_base_model(folder: Path) -> str | None:
    """Return the name of the base model of the tuned tensors in a folder, or None if it holds none.

    Raises:
        UsageError: the tensors cannot be read.
    """
    if not (folder / TUNED_FILE).is_file():
        return None
    try:
        with safe_open(folder / TUNED_FILE, framework="pt") as file:
            return str(file.metadata()["base_model"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / TUNED_FILE} cannot be read: {error}") from None


@torch.no_grad()
def load_tuned(model: nn.Module, folder: Path) -> None:
    """Copy the tuned tensors of a folder into their base model.

    Raises:
        UsageError: the model has no such tensors.
    """
    try:
        with safe_open(folder / TUNED_FILE, framework="pt") as file:
            tuned = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dict
        suffix = f".{SCALES}"
        layers = [name.removesuffix(suffix) for name in tuned if name.endswith(suffix)]
        # A tied tensor is saved once, under its first name.
        add_scales(_with_ties(model, {name: model.get_submodule(name) for name in layers}))
        for name, value in tuned.items():
            model.get_parameter(name).copy_(value)
    except (AttributeError, RuntimeError) as error:
        raise UsageError(f"{folder / TUNED_FILE} belongs to another base model: {error}") from None
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise UsageError(f"{folder / TUNED_FILE} cannot be read: {error}") from None


def _with_ties(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return these layers, and those tied to them."""
    blocks = {id(layer.weight) for layer in layers.values()}
    return {name: m for name, m in model.named_modules() if id(m._parameters.get("weight")) in blocks}
