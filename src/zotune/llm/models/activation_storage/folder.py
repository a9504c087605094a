"""Activations below the tuned layers in a folder, for runs that share the model and rows: a search, seeds, a benchmark.

Each file holds the activations of one group of sequences. Its name covers what their bits depend on: every frozen
number of the model, the code, the libraries, the processor's instructions, the threads, the number of layers, and the
tokens of the group. Another run that finds the file reads the bits that it would have computed.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import zotune
from zotune.ledger.replay import digests_of
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.quantized.backends import frozen_tensors
from zotune.messages import say
from zotune.system.atomic_write import atomic_write
from zotune.system.libraries import library_version

Group = Sequence[tuple[int, ...]]
# Marks the outputs of layers that are no tuple.
_NO_TUPLE = "none"


class ActivationFolder:
    """The activations of groups of sequences, in files that other runs read.

    Args:
        folder: made if it is not there; files of other models and settings may lie in it too.
        lm: the model, whose tuned parameters are marked.
        depth: the number of layers whose output is stored.
    """

    def __init__(self, folder: Path, lm: LanguageModel, depth: int) -> None:
        self._folder, self._context, self._device = folder, _context(lm, depth), lm.device
        self._is_writable = True

    def get(self, group: Group) -> tuple[tuple[Tensor, ...], int | None] | None:
        """Return the (L, width) activations of a group and how many values follow them in a layer's output.

        The number is None for an output that is no tuple; the whole is None if no file has the group.
        """
        try:
            with safe_open(self._path(group), "pt", device=str(self._device)) as file:
                tensors = tuple(file.get_tensor(str(i)) for i in range(len(group)))
                rest = (file.metadata() or {})["rest"]
        except (OSError, SafetensorError, KeyError):
            return None  # a damaged file is written anew
        return tensors, None if rest == _NO_TUPLE else int(rest)

    def put(self, group: Group, activations: Sequence[Tensor], rest: int | None) -> None:
        """Store the activations of a group; without room the run goes on without."""
        if not self._is_writable:
            return
        # Copies, because all of a group are views of one batch.
        tensors = {str(i): own.detach().cpu().clone() for i, own in enumerate(activations)}
        path = self._path(group)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                save_file(tensors, temporary, {"rest": _NO_TUPLE if rest is None else str(rest)})
        except (OSError, SafetensorError) as error:
            self._is_writable = False
            say(f"activations cannot be written to {self._folder} ({error}); the run goes on without writing them")

    def _path(self, group: Group) -> Path:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([self._context, [list(tokens) for tokens in group]]).encode())
        return self._folder / f"{digest.hexdigest()}.safetensors"


def _context(lm: LanguageModel, depth: int) -> str:
    """Return a digest of what the activations depend on besides their tokens."""
    settings = {
        "versions": [zotune.__version__, torch.__version__, *map(library_version, ("transformers", "peft"))],
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "matmul": torch.get_float32_matmul_precision(),
        "device": str(lm.device),
        "depth": depth,
        "config": lm.config.to_dict(),
        "attention": getattr(lm.config, "_attn_implementation", None),
        "pad": lm.pad_token_id,
    }
    frozen = frozen_tensors(lm.module) | {f"buffer {name}": tensor for name, tensor in lm.module.named_buffers()}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, own in zip(frozen, digests_of(frozen.values()), strict=True):
        digest.update(f"{name} {own}\n".encode())
    return digest.hexdigest()
