"""The attention that the user asks for by name: one of transformers, of an installed package, never of the Hub."""

from __future__ import annotations

from typing import Any

import torch

from zotune.errors import UsageError

_FLASH = "flash_attention_"


def attention_arguments(name: str | None, device: torch.device) -> dict[str, Any]:
    """Return the argument of transformers for an attention by name; none for the model's own.

    transformers would fetch a kernel from the Hub in place of a package that is not installed, so that is refused here.

    Args:
        name: a value of the option `attn_implementation`.
        device: the device that runs the model.

    Raises:
        UsageError: the attention needs a GPU or a package that is not here.

    >>> attention_arguments("eager", torch.device("cpu")), attention_arguments(None, torch.device("cpu"))
    ({'attn_implementation': 'eager'}, {})
    """
    if name is None:
        return {}
    if name.startswith(_FLASH):
        if device.type != "cuda":
            raise UsageError(
                f"attn_implementation: {name} runs on a GPU, and the device is {device.type}; use sdpa or eager."
            )
        if not _has_package(name.removeprefix(_FLASH)):
            raise UsageError(
                f"attn_implementation: {name} needs its package (flash-attn), which is not installed here or not made "
                "for this GPU, and no kernel is fetched from the Hub in its place. Install it, or use sdpa."
            )
    return {"attn_implementation": name}


def _has_package(version: str) -> bool:
    from transformers import utils

    is_available: Any = getattr(utils, f"is_flash_attn_{version}_available", lambda: False)
    return bool(is_available())
