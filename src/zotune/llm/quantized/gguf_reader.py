"""Reading the tensors of a GGUF file by mapping it into memory (the GGUF specification, versions 2 and 3).

The header also holds a tokenizer of many thousand strings; the `gguf` package reads all of them, this module skips
them.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from zotune.errors import UsageError

_STRING, _ARRAY = 8, 9
# struct formats of the scalar value types, by number.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


_MAX_DIMENSIONS = 8  # ggml has 4

# Numbers in the longest list that is read: a value for each layer, but not one for each token.
_LONG = 1024


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        name: its name in the file.
        kind: its format, by ggml's name.
        shape: the shape of its values.
        data: values of F32 and F16; of other formats bytes, the last dimension being a row. Writing to it does not
            change the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, Any]


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file: the model's architecture, its tensors, and its keys without long lists."""

    architecture: str
    tensors: tuple[StoredTensor, ...]
    keys: dict[str, Any]


def read_gguf(path: Path) -> GGUFFile:
    """Read a GGUF file; the values of its tensors are mapped from the disk.

    Raises:
        UsageError: the file is no GGUF file, or is truncated.
    """
    try:
        with path.open("rb") as file:
            header = _Header(file)
            infos = [header.tensor() for _ in range(header.num_tensors)]
            begin = -(-file.tell() // header.alignment) * header.alignment
        mapped = np.memmap(path, dtype=np.uint8, mode="c")
        architecture = header.keys.get("general.architecture", "")
        if not isinstance(architecture, str):
            raise ValueError("its architecture is no text")
        return GGUFFile(architecture, tuple(_stored(mapped, begin, *info, path) for info in infos), header.keys)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UsageError:
        raise
    except (struct.error, LookupError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{path} is no GGUF file: {error}. Check the path, or download the file again.") from None


def _stored(
    mapped: np.ndarray[Any, Any], begin: int, name: str, shape: tuple[int, ...], number: int, offset: int, path: Path
) -> StoredTensor:
    """Return a tensor of the mapped file.

    Raises:
        UsageError: it ends after the file.
        ValueError: its format is unknown, or its rows are no whole blocks.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(number)
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block_values:
        raise ValueError(f"the rows of {name!r} are no whole blocks")
    end = begin + offset + prod(shape) // block_values * block_bytes
    if end > mapped.size:
        raise UsageError(f"{path} is truncated: {name} ends at byte {end} of {mapped.size}. Download the file again.")
    data = np.asarray(mapped[begin + offset : end])
    data = data.view({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))
    return StoredTensor(name, kind.name, shape, data.reshape(*shape[:-1], -1))


class _Header:
    """The header of a GGUF file, read from front to back; no count in it is believed beyond the end of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        magic, version, self.num_tensors, count = self._read("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise KeyError(f"it starts with {magic!r} and version {version}")
        self.keys: dict[str, Any] = {}
        for _ in range(count):
            key, (kind,) = self._string(), self._read("I")
            value = self._value(kind)
            if value is not None:
                self.keys[key] = value
        self.alignment = self.keys.get("general.alignment", 32)
        if type(self.alignment) is not int or self.alignment < 1:
            raise ValueError(f"its alignment is {self.alignment!r}")

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read the name, shape, format number and offset of the next tensor."""
        name, (dims,) = self._string(), self._read("I")
        if dims > _MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name!r} has {dims} dimensions")
        shape = self._read(f"{dims}Q")
        return name, tuple(reversed(shape)), *self._read("IQ")

    def _read(self, layout: str) -> Any:
        layout = f"<{layout}"
        return struct.unpack(layout, self._file.read(struct.calcsize(layout)))

    def _string(self) -> str:
        (size,) = self._read("Q")
        self._check_left(size)
        return self._file.read(size).decode()

    def _check_left(self, size: int) -> None:
        """Check that so many bytes follow, before room is made for them.

        Raises:
            ValueError: the file ends before.
        """
        if size > self._size - self._file.tell():
            raise ValueError(f"{size} bytes should follow byte {self._file.tell()}, but the file has {self._size}")

    def _value(self, kind: int) -> Any:
        """Read a value; None for a list of strings or lists, and for a list that is long, which are skipped."""
        if kind in _SCALARS:
            return self._read(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise KeyError(f"a value has the unknown type {kind}")
        inner, count = self._read("IQ")
        if inner in _SCALARS:
            if count <= _LONG:
                return self._read(f"{count}{_SCALARS[inner]}")
            size = count * struct.calcsize(f"<{_SCALARS[inner]}")
            self._check_left(size)
            self._file.seek(size, 1)
        else:
            for _ in range(count):
                self._skip(inner)
        return None

    def _skip(self, kind: int) -> None:
        if kind == _STRING:
            (size,) = self._read("Q")
            self._check_left(size)
            self._file.seek(size, 1)
        else:
            self._value(kind)
