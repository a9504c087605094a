"""Mapped tensors take memory only while they are used, keep what is written, and leave other memory alone."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from zotune.errors import NotWrittenError
from zotune.model.mapped_memory import (
    ScratchFile,
    is_mapped,
    mapped_safetensors,
    populate,
    prefetch,
    release,
)
from zotune.model.streaming import LayerStream

MB = 1 << 20


def private_bytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_what_is_written_stays_after_the_memory_is_given_back(tmp_path, dtype):
    x = torch.arange(5000).view(50, 100).to(dtype)
    mapped = ScratchFile(tmp_path).copy(x)
    assert torch.equal(mapped, x) and is_mapped(mapped) and not is_mapped(x)
    mapped[3] = 7
    release(mapped)
    populate(mapped, writes=True)
    prefetch(mapped)
    assert torch.equal(mapped[3], torch.full((100,), 7, dtype=dtype)) and torch.equal(mapped[4:], x[4:])


def test_released_tensors_take_no_memory(tmp_path):
    mapped = ScratchFile(tmp_path).empty((8 * MB,), torch.float32)
    before = private_bytes()
    mapped.fill_(1.5)
    assert private_bytes() - before > 30 * MB
    release(mapped)
    assert private_bytes() - before < 2 * MB
    assert float(mapped.sum()) == 1.5 * 8 * MB


def test_memory_of_others_is_left_alone(tmp_path):
    mapped = ScratchFile(tmp_path).empty((100,), torch.float32)
    start = mapped.data_ptr()
    assert is_mapped(mapped)
    x = torch.ones(1000)
    for function in (release, prefetch):
        function(x)
    assert float(x.sum()) == 1000
    del mapped
    assert not any(is_mapped(torch.empty(1)) for _ in range(3))
    from zotune.model import mapped_memory

    assert start not in mapped_memory._ENDS


def test_a_safetensors_file_is_mapped_to_its_values(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.arange(3, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    mapped = mapped_safetensors(tmp_path / "model.safetensors")
    assert mapped.keys() == tensors.keys()
    assert all(torch.equal(mapped[name], x) and is_mapped(mapped[name]) for name, x in tensors.items())


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_another_file_is_none(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError):
        mapped_safetensors(tmp_path / "model.safetensors")


def test_a_full_disk_and_a_folder_that_is_none_are_told_in_words(tmp_path, monkeypatch):
    scratch = ScratchFile(tmp_path)
    with pytest.raises(NotWrittenError, match="no file can be written"):
        ScratchFile(tmp_path / "nowhere")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NotWrittenError, match=r"has no room for 4 MB more: No space left on device"):
        scratch.empty((MB,), torch.float32)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1024, 1024)

    def forward(self, x):
        return self.inner(x)


def test_no_more_than_a_layer_is_in_memory_while_a_model_runs(tmp_path):
    """Sixteen layers of 4 MB; each looks how much there is when it runs."""
    torch.manual_seed(0)
    model, scratch, seen = nn.Sequential(*[Wrapped() for _ in range(16)]), ScratchFile(tmp_path), []
    for layer in model:
        layer.inner.weight.data = scratch.copy(layer.inner.weight.data)
        layer.inner.register_forward_hook(lambda *_: seen.append(private_bytes()))
    LayerStream(model, scratch, torch.device("cpu"))
    before = private_bytes()
    with torch.no_grad():
        model(torch.ones(1, 1024))
    assert 4 * MB <= max(seen) - before < 3 * 4 * MB
