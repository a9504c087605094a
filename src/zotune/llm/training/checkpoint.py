"""A full checkpoint: weights and optimizer state in one safetensors file, written whole or not at all.

The tree of a state is JSON in the file's metadata, its tensors are the file's; nothing that is read can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zotune.errors import NotWrittenError
from zotune.ledger.files import sync_folder
from zotune.ledger.replay import digests_of


class DamagedCheckpointError(ValueError):
    """The file is no checkpoint, or not as it was written."""


def save(path: Path, tree: Any) -> None:
    """Write dicts, lists, tensors and plain values; when this returns they are on the disk.

    Raises:
        NotWrittenError: there is no room; what was there before still is.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_flatten(tree, tensors))
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, aside, {"tree": plain, "digest": _digest(plain, tensors)})
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise NotWrittenError(f"the checkpoint could not be written to {path}: {error}.") from None


def load(path: Path) -> Any:
    """What `save` was given; tensors are on the CPU.

    Raises:
        DamagedCheckpointError: it cannot be read, or its digest is another.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a file, not a dict
        if metadata["digest"] != _digest(metadata["tree"], tensors):
            raise DamagedCheckpointError("its digest is another")
        return _unflatten(json.loads(metadata["tree"]), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {error}") from None


def _digest(plain: str, tensors: dict[str, Tensor]) -> str:
    names = sorted(tensors)
    parts = [plain, *names, *digests_of(tensors[name] for name in names)]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree with [kind, content] at each node, so that keys that are no strings and tuples come back."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().to("cpu").contiguous()
        return ["tensor", key]
    if isinstance(value, dict):
        return ["dict", [[_flatten(k, tensors), _flatten(v, tensors)] for k, v in value.items()]]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [_flatten(v, tensors) for v in value]]
    return ["value", value]


def _unflatten(node: Any, tensors: dict[str, Tensor]) -> Any:
    kind, content = node
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unflatten(k, tensors): _unflatten(v, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        found = [_unflatten(v, tensors) for v in content]
        return tuple(found) if kind == "tuple" else found
    return content


@torch.no_grad()
def put(weights: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    """Copy weights into parameters, by name.

    Raises:
        DamagedCheckpointError: they are not those.
    """
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in parameters.items()}:
        raise DamagedCheckpointError("its tensors are not those of the model")
    for name, p in parameters.items():
        p.copy_(weights[name])
