"""Reading the tensors of a GGUF file by mapping it into memory (the GGUF specification, versions 2 and 3).

The header also holds a tokenizer of many thousand strings; the `gguf` package reads all of them, this module skips
them.
"""

from __future__ import annotations

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
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        with path.open("rb") as file:
            header = _Header(file)
            infos = [header.tensor() for _ in range(header.num_tensors)]
            begin = -(-file.tell() // header.alignment) * header.alignment
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no GGUF file: {error}. Check the path, or download the file again.") from None
    mapped = np.memmap(path, dtype=np.uint8, mode="c")
    tensors = []
    for name, shape, number, offset in infos:
        kind = GGMLQuantizationType(number)
        block_values, block_bytes = GGML_QUANT_SIZES[kind]
        end = begin + offset + prod(shape) // block_values * block_bytes
        if end > mapped.size:
            raise UsageError(
                f"{path} is truncated: {name} ends at byte {end} of {mapped.size}. Download the file again."
            )
        data = np.asarray(mapped[begin + offset : end])
        data = data.view({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))
        tensors.append(StoredTensor(name, kind.name, shape, data.reshape(*shape[:-1], -1)))
    return GGUFFile(header.keys.get("general.architecture", ""), tuple(tensors), header.keys)


class _Header:
    """The header of a GGUF file, read from front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        magic, version, self.num_tensors, count = self._read("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise KeyError(f"it starts with {magic!r} and version {version}")
        self.keys: dict[str, Any] = {}
        for _ in range(count):
            key, (kind,) = self._string(), self._read("I")
            value = self._value(kind)
            if value is not None:
                self.keys[key] = value
        self.alignment = int(self.keys.get("general.alignment", 32))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read the name, shape, format number and offset of the next tensor."""
        name, (dims,) = self._string(), self._read("I")
        shape = self._read(f"{dims}Q")
        return name, tuple(reversed(shape)), *self._read("IQ")

    def _read(self, layout: str) -> Any:
        layout = f"<{layout}"
        return struct.unpack(layout, self._file.read(struct.calcsize(layout)))

    def _string(self) -> str:
        (size,) = self._read("Q")
        return self._file.read(size).decode()

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
            self._file.seek(count * struct.calcsize(f"<{_SCALARS[inner]}"), 1)
        else:
            for _ in range(count):
                self._skip(inner)
        return None

    def _skip(self, kind: int) -> None:
        if kind == _STRING:
            (size,) = self._read("Q")
            self._file.seek(size, 1)
        else:
            self._value(kind)
