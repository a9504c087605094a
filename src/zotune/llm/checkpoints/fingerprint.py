"""A fingerprint of the base model beside what was tuned on it, so that it is never loaded onto another base.

The fingerprint covers the name, dtype and shape of each parameter and a sample of its values, so it costs little for a
model of any size. Another fine-tune or another seed changes nearly every value, and so the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zotune.errors import UsageError
from zotune.model.mapped_memory import release
from zotune.model.shards import reshard, whole
from zotune.system.bounds import read_json

FILE = "base_model.json"
_SAMPLE = 256


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, str] | None:
    """Return the dtype and the digest of a model's parameters; None for a model without values.

    >>> fingerprint(nn.Linear(2, 2)) == fingerprint(nn.Linear(2, 2))
    False
    """
    reshard(model)
    digest, dtypes = hashlib.blake2b(digest_size=16), set()
    for name, own in sorted(model.named_parameters()):
        if own.is_meta:
            return None
        p = whole(own.detach())  # of a model in shards every process calls this
        dtypes.add(str(p.dtype).removeprefix("torch."))
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        if is_traceable_wrapper_subclass(p) or not p.numel():
            continue
        flat = p.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].contiguous().cpu()
        release(p.detach())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return {"dtypes": ", ".join(sorted(dtypes)), "digest": digest.hexdigest()}


def write_fingerprint(folder: Path, value: dict[str, str] | None, built_in: str | None = None) -> None:
    """Write the fingerprint of a base model beside what was tuned on it, with the name of a built-in one."""
    content = {**({} if built_in is None else {"model": built_in}), **(value or {})}
    if content:
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_fingerprint(folder: Path, model: nn.Module, base: str) -> None:
    """Check that a base model is the one that the tuned tensors in a folder belong to.

    A folder without a fingerprint, or a base that is loaded in another precision, is not compared.

    Raises:
        UsageError: it is another one.
    """
    try:
        saved = read_json(folder / FILE)
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{folder / FILE} cannot be read: {error}") from None
    if not isinstance(saved, dict):
        raise UsageError(f"{folder / FILE} is no JSON object that describes a base model; restore it, or delete it.")
    here = fingerprint(model)
    if here is not None and saved.get("dtypes") == here["dtypes"] and saved.get("digest") != here["digest"]:
        raise UsageError(
            f"what is in {folder} was tuned on another model than {base} is now: the base model's weights differ. "
            f"Restore that model; if you want this one in its place, delete {folder / FILE}."
        )
