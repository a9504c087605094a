"""Changes to files: of their bytes, of the values in their JSON, of the header of a safetensors file or a ledger."""

import json
import zlib

from zotune.ledger.format import FORMAT_VERSION, MAGIC, checksum

# Text that readers, terminals and pages take for something else than text.
TEXT = ("", " ", "a" * 2000, "\x1b[31m\x1b]0;x\x07", "../../x", "/dev/null", "a\0b", "<b>&|`*", "\u202e", "\ud800", "é")
TEXT += ("nan", "1e400", "-1", "none", "null", "True", "random:llama-tiny", "random:llama-tiny ", ".", "case")
NUMBERS = (0, -1, 1, 2, 3, 7, 255, 2**16, 2**31, 2**32, 2**40, 2**63, 2**64, -(2**63), 10**30)
NUMBERS += (0.5, -0.0, 1e-320, 1e308, 1e30, float("nan"), float("inf"), float("-inf"))
OTHERS = (None, True, False, [], {}, [[]], [None], {"a": {}}, [1, "a"], {"": 1}, [0] * 300)
ODD = (*TEXT, *NUMBERS, *OTHERS)
PIECES = (b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"\\", b"\0", b"\xff", b"\x80\x80", b"{}" * 40, b"[" * 3000)


def of_bytes(content, chance):
    """Some bytes changed, put in, taken out, repeated or cut off."""
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 3, 5])):
        at, size = chance.randrange(len(content) + 1), chance.choice([1, 1, 2, 4, 8, 40])
        kind = chance.choice(["flip", "flip", "set", "put in", "piece", "take out", "repeat", "cut", "zeros"])
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif kind == "set":
            content[at : at + size] = chance.randbytes(size)
        elif kind == "put in":
            content[at:at] = chance.randbytes(size)
        elif kind == "piece":
            content[at:at] = chance.choice(PIECES)
        elif kind == "take out":
            del content[at : at + size]
        elif kind == "repeat":
            content[at:at] = content[at : at + size] * chance.choice([1, 3])
        elif kind == "cut":
            del content[at:]
        elif kind == "zeros":
            content[at : at + size] = bytes(size)
    return bytes(content)


def _places(value, found, depth=0):
    """All containers within a value."""
    if isinstance(value, (dict, list)) and depth < 20:
        found.append(value)
        for inner in value.values() if isinstance(value, dict) else value:
            _places(inner, found, depth + 1)
    return found


def odd(chance):
    """A value that few expect; a deep one now and then."""
    value = chance.choice(ODD)
    if chance.random() < 0.02:
        for _ in range(chance.choice([50, 500])):
            value = [value]
    return json.loads(json.dumps(value)) if isinstance(value, (list, dict)) else value


def of_values(value, chance):
    """A value of JSON with some of its parts replaced, taken out, renamed or added; the value itself is changed."""
    if chance.random() < 0.02 or not isinstance(value, (dict, list)):
        return odd(chance)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        place = chance.choice([p for p in _places(value, []) if p] or [value])
        if not place:
            continue
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        kind = chance.choice(["replace", "replace", "replace", "take out", "rename", "swap", "repeat"])
        if kind == "replace":
            place[key] = odd(chance)
        elif kind == "take out":
            del place[key]
        elif kind == "rename" and isinstance(place, dict):
            place[chance.choice(TEXT)] = place.pop(key)
        elif kind == "swap":
            other = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
            place[key], place[other] = place[other], place[key]
        elif kind == "repeat" and isinstance(place, list):
            place.append(place[key])
    return value


def of_json(content, chance):
    """A JSON file with other values, or other bytes."""
    if chance.random() < 0.3:
        return of_bytes(content, chance)
    return json.dumps(of_values(json.loads(content), chance)).encode("utf-8", errors="replace")


def of_lines(content, chance):
    """A file of lines of JSON with other values in one of them, or other bytes."""
    lines = content.splitlines()
    if chance.random() < 0.3 or not lines:
        return of_bytes(content, chance)
    at = chance.randrange(len(lines))
    lines[at] = json.dumps(of_values(json.loads(lines[at]), chance)).encode("utf-8", errors="replace")
    return b"\n".join(lines) + b"\n"


def of_safetensors(content, chance):
    """A safetensors file with another header, or other bytes."""
    if chance.random() < 0.4:
        return of_bytes(content, chance)
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(of_values(json.loads(content[8 : 8 + size]), chance)).encode("utf-8", errors="replace")
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def of_ledger(content, chance):
    """A ledger with another header and other records, whose checksums are right; or with other bytes."""
    if chance.random() < 0.25:
        return of_bytes(content, chance)
    start = 20 + int.from_bytes(content[12:16], "little")
    header, rows = json.loads(zlib.decompress(content[20:start])), content[start:]
    fields = dict(header["layout"])
    if chance.random() < 0.8:
        header = of_values(header, chance)
    size = record_size(fields)
    rows = [rows[i : i + size] for i in range(0, len(rows), size)]
    if chance.random() < 0.4 and rows:
        at = chance.randrange(len(rows))
        rows[at] = of_record(rows[at], chance)
    return ledger(header, rows)


def record_size(layout):
    numbers = 1 + layout["num_groups"] + layout["num_coefficients"]
    scales = -(-(3 + layout["num_estimates"]) // 4) * 4
    return 4 + scales + numbers * (8 if layout["precision"] == "f8" else 4)


def of_record(row, chance):
    """A record with other scales, or numbers that are none."""
    row = bytearray(row)
    if chance.random() < 0.5:
        row[7] = chance.randrange(256)
    else:
        at = chance.randrange(8, len(row), 4)
        row[at : at + 4] = chance.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", chance.randbytes(4)])
    return bytes(row)


def ledger(header, rows):
    """The bytes of a ledger with this header, whatever it is, and these records."""
    body = zlib.compress(json.dumps(header, separators=(",", ":")).encode("utf-8", errors="replace"))
    start = MAGIC + FORMAT_VERSION.to_bytes(4, "little") + len(body).to_bytes(4, "little")
    crc = zlib.crc32(body, zlib.crc32(start))
    content = start + crc.to_bytes(4, "little") + body
    for i, row in enumerate(rows):
        content += checksum(row, i, crc).to_bytes(4, "little") + row[4:]
    return content
