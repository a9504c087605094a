"""No count in the header of a GGUF file is believed: the file is refused in words, in little memory and time."""

import struct

import pytest

from zotune.errors import UsageError
from zotune.llm.quantized.gguf_reader import read_gguf

MIB = 1 << 20
HUGE = 2**62


def text(value):
    return struct.pack("<Q", len(value)) + value


def start(tensors=0, keys=0):
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys)


def key(kind, value):
    return start(keys=1) + text(b"a") + struct.pack("<I", kind) + value


def tensor(*shape, kind=0, offset=0):
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return start(tensors=1) + text(b"t") + dimensions + struct.pack("<IQ", kind, offset)


CRAFTED = {
    "tensors": start(tensors=HUGE),
    "keys": start(keys=2**64 - 1),
    "the name of a key": start(keys=1) + struct.pack("<Q", 2**40),
    "a text": key(8, struct.pack("<Q", 2**63)),
    "a list of numbers": key(9, struct.pack("<IQ", 4, HUGE)),
    "a list of texts": key(9, struct.pack("<IQ", 8, HUGE)),
    "a list of lists": key(9, struct.pack("<IQ", 9, 1) * 100_000),
    "a text in a list": key(9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", 2**63)),
    "dimensions": start(tensors=1) + text(b"t") + struct.pack("<I", 2**31),
    "a shape": tensor(HUGE, HUGE),
    "an offset": tensor(4, offset=2**63),
    "no whole block": tensor(5, kind=8),
    "a format": tensor(4, kind=999),
    "no dimension": tensor(),
    "no text": key(8, struct.pack("<Q", 1) + b"\xff"),
    "a type": key(77, b""),
    "an alignment": start(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 0),
    "another alignment": start(keys=1) + text(b"general.alignment") + struct.pack("<I", 8) + text(b"x"),
    "an architecture": start(keys=1) + text(b"general.architecture") + struct.pack("<II", 4, 0),
    "nothing": b"",
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_is_refused(tmp_path, little_memory, name):
    path = tmp_path / "a.gguf"
    path.write_bytes(CRAFTED[name])
    with little_memory(200 * MIB), pytest.raises(UsageError, match=r"a\.gguf"):
        read_gguf(path)


def test_transformers_reads_no_file_that_was_not_checked(tmp_path, zotune, rows_file):
    path = tmp_path / "a.gguf"
    path.write_bytes(CRAFTED["a list of texts"])
    said = zotune("eval", "--model", path, "--eval-file", rows_file)
    assert (said.code, "is no GGUF file" in said.err) == (2, True)
