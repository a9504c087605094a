"""Reading and writing safetensors files one tensor at a time, so that a model may be larger than memory.

The format (github.com/huggingface/safetensors) is the size of the header as a u64, the header in JSON, then all values.
Writing can start as soon as names, dtypes and shapes are known, and holds one tensor in memory at a time. File names
and the index of the shards are those of transformers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zotune.errors import UsageError

# The default shard size of transformers.
MAX_SHARD_SIZE = "50GB"

# The format's names of dtypes.
_DTYPE_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}


class Checkpoint:
    """The tensors in some safetensors files; only their names are held in memory.

    Raises:
        UsageError: a file cannot be read.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        for path in files:
            self._file_of |= dict.fromkeys(_read(path, lambda file: list(file.keys())), path)

    @property
    def names(self) -> frozenset[str]:
        """The names of the tensors."""
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading its values."""
        return tuple(_read(self._file_of[name], lambda file: file.get_slice(name).get_shape()))

    def tensor(self, name: str) -> Tensor:
        """Read a tensor into new memory."""
        value: Tensor = _read(self._file_of[name], lambda file: file.get_tensor(name))
        return value


def _read(path: Path, read: Callable[[Any], Any]) -> Any:
    # The file is opened for each read: the pages of an open mapping count as the process's memory.
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the weights in {str(path)!r} cannot be read: {error}") from None


def check_shard_size(size: str) -> str:
    """Return a shard size in the notation of transformers, such as 5GB.

    Raises:
        UsageError: the size is not a whole number with a unit.

    >>> check_shard_size("5GB")
    '5GB'
    """
    if not re.fullmatch(r"[1-9][0-9]*(B|KB|MB|GB|TB)", size):
        raise UsageError(
            f"the maximum size of a file is a whole number with its unit, such as 5GB or 500MB; got {size!r}."
        )
    return size


def write_shards(
    folder: Path,
    shapes: Mapping[str, Tensor],
    tensor: Callable[[str], Tensor],
    num_parameters: int,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write weights into a folder as transformers does, one tensor at a time.

    Args:
        folder: an existing folder.
        shapes: tensors on `meta` with the dtypes and shapes to write, by name.
        tensor: returns the tensor of a name; called once for each name.
        num_parameters: the number of parameters, for the index.
        max_shard_size: maximum size of a file; a larger tensor gets a file of its own.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        dict(shapes), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        _write(folder / file, {name: shapes[name] for name in names}, tensor)
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": num_parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write(path: Path, shapes: Mapping[str, Tensor], tensor: Callable[[str], Tensor]) -> None:
    # The widest dtypes come first, as in the format's own library, so that each tensor is aligned to its dtype.
    order = sorted(shapes, key=lambda name: (-shapes[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        like = shapes[name]
        begin, end = end, end + math.prod(like.shape) * like.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value, like = tensor(name), shapes[name]
            assert value.dtype == like.dtype and value.shape == like.shape, name
            numbers: Any = value.contiguous().view(-1).view(torch.uint8).numpy()
            file.write(numbers.data)
