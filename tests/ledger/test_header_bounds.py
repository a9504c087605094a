"""A ledger's header that somebody else wrote takes no more memory or time than its bounds allow."""

import json
import time
import zlib

import pytest

from zotune.ledger import LedgerError, read
from zotune.ledger.format import FORMAT_VERSION, MAGIC
from zotune.llm.ledger.rebuild import config_of, rebuild
from zotune.llm.training.train import train

MIB = 1 << 20


def as_ledger(path, body):
    """A file with this deflated header, whose checksum is right."""
    start = MAGIC + FORMAT_VERSION.to_bytes(4, "little") + len(body).to_bytes(4, "little")
    path.write_bytes(start + zlib.crc32(body, zlib.crc32(start)).to_bytes(4, "little") + body)
    return path


def deflated(part, megabytes):
    """A text of so many megabytes, deflated piece by piece."""
    deflate, piece = zlib.compressobj(9), part * (MIB // len(part))
    return deflate.compress(b"[") + b"".join(deflate.compress(piece) for _ in range(megabytes)) + deflate.flush()


@pytest.mark.parametrize(("part", "megabytes", "variable"), [(b" ", 70, "BYTES"), (b"{},", 15, "VALUES")])
def test_a_header_that_inflates_without_end_is_refused(tmp_path, little_memory, monkeypatch, part, megabytes, variable):
    if variable == "BYTES":
        monkeypatch.setenv("ZOTUNE_MAX_JSON_BYTES", str(MIB))
    path = as_ledger(tmp_path / "a.zol", deflated(part, megabytes))
    assert path.stat().st_size < MIB
    with little_memory(50 * MIB), pytest.raises(LedgerError, match=f"ZOTUNE_MAX_JSON_{variable}"):
        read(path)


def test_a_ledger_of_endless_size_is_not_read(tmp_path, little_memory):
    path = as_ledger(tmp_path / "a.zol", zlib.compress(b"{}"))
    with path.open("ab") as file:
        file.truncate(1 << 42)
    with little_memory(100 * MIB), pytest.raises(LedgerError, match="ZOTUNE_MAX_LEDGER_BYTES"):
        read(path)


@pytest.mark.parametrize(
    "options",
    [
        {"num_queries": 2**40},
        {"tuning": "lora", "lora_r": 2**40},
        {"tuning": "prompt", "num_virtual_tokens": 2**40},
        {"rank": 2**40},
        {"tuned_parameters": "(.+)+$"},
        {
            "tuning": "peft",
            "peft_type": "lora",
            "peft_config": '{"megatron_config": {"a": 1}, "megatron_core": "evil"}',
        },
    ],
    ids=lambda options: next(reversed(options)),
)
def test_options_in_a_header_ask_for_nothing_without_end(config, tmp_path, options):
    train(config(max_steps=1))
    content = (tmp_path / "out" / "ledger.zol").read_bytes()
    header = json.loads(zlib.decompress(content[20 : 20 + int.from_bytes(content[12:16], "little")]))
    header["about"]["config"].update(options)
    path = as_ledger(tmp_path / "a.zol", zlib.compress(json.dumps(header).encode()))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"ZOTUNE_MAX_COUNT|repeats a part|names code"):
        rebuild(read(path))
    assert time.monotonic() - begin < 10


def test_a_function_that_a_header_names_is_not_imported(config, tmp_path, monkeypatch):
    train(config(max_steps=1))
    ledger = read(tmp_path / "out" / "ledger.zol")
    ledger.header.about["config"].update(objective="evil:run")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    assert config_of(ledger).objective == "evil:run"
    rebuild(ledger)
