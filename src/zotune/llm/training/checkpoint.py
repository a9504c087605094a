"""Full checkpoints: weights and optimizer state in one safetensors file, written atomically.

The structure of the state is JSON in the metadata of the file, its tensors are the file's tensors; loading runs no
code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zotune.errors import NotWrittenError
from zotune.ledger.replay import digests_of
from zotune.model.shards import assign_
from zotune.system.atomic_write import atomic_write, sync
from zotune.system.bounds import parse_json


class DamagedCheckpointError(ValueError):
    """The file is no checkpoint, or was damaged after it was written."""


def save(path: Path, tree: Any) -> None:
    """Write a tree of dicts, lists, tensors and plain values, and wait until it is on the disk.

    Raises:
        NotWrittenError: the disk is full; an earlier checkpoint is unchanged.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_flatten(tree, tensors))
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {"tree": plain, "digest": _digest(plain, tensors)})
            sync(temporary)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise NotWrittenError(f"the checkpoint could not be written to {path}: {error}.") from None


def load(path: Path) -> Any:
    """Load a tree that `save` wrote, with tensors on the CPU.

    Raises:
        DamagedCheckpointError: the file cannot be read, or its digest is wrong.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a file, not a dict
        if metadata["digest"] != _digest(metadata["tree"], tensors):
            raise DamagedCheckpointError("its digest does not match its content")
        return _unflatten(parse_json(metadata["tree"], str(path)), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {error}") from None


def _digest(plain: str, tensors: dict[str, Tensor]) -> str:
    names = sorted(tensors)
    parts = [plain, *names, *digests_of(tensors[name] for name in names)]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the tree with [kind, content] at each node, which preserves tuples and keys that are no strings."""
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
        values = [_unflatten(v, tensors) for v in content]
        return tuple(values) if kind == "tuple" else values
    return content


@torch.no_grad()
def restore_weights(weights: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    """Copy weights into parameters of the same names.

    Raises:
        DamagedCheckpointError: the names or shapes differ.
    """
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in parameters.items()}:
        raise DamagedCheckpointError("its tensors do not match those of the model")
    for name, p in parameters.items():
        assign_(name, p, weights[name])
