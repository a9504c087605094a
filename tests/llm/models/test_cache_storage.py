"""What is kept comes back bit for bit, within its bounds, and leaves no file behind."""

import errno
import os

import pytest
import torch

from zotune.llm.models.activation_storage.tiers import ActivationStore, FileTier, MemoryTier


def made(n, dtype=torch.float32, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("tier", ["memory", "file", "both"])
def test_tensors_of_every_precision_come_back_bit_for_bit(tmp_path, tier):
    memory, file = MemoryTier(1000), FileTier(1000, tmp_path)
    kept = {"memory": memory, "file": file, "both": ActivationStore([MemoryTier(40), file])}[tier]
    values = {
        (i,): made(n, dtype, i)
        for i, (n, dtype) in enumerate(
            [(1, torch.bfloat16), (3, torch.float32), (5, torch.float16), (2, torch.float64)]
        )
    }
    copies = {key: value.clone() for key, value in values.items()}
    for key, value in values.items():
        assert kept.put(key, value)
        value.zero_()
    for key, value in copies.items():
        found = kept.get(key)
        assert found.dtype == value.dtype
        assert torch.equal(found, value)
        found.zero_()  # what a caller does to its copy of a file's stays its own
    if tier == "file":
        assert all(torch.equal(kept.get(key), value) for key, value in copies.items())
    assert kept.get((9,)) is None


@pytest.mark.parametrize("bound", [0, 35, 36, 71, 72])
def test_no_more_is_kept_than_the_bound(tmp_path, bound):
    tiers = [MemoryTier(bound), *([FileTier(bound, tmp_path)] if bound else [])]
    for tier in tiers:
        fits = [tier.put((i,), made(3)) for i in range(3)]
        assert fits[0] == (bound >= 36)
        held = [tier.get((i,)) for i in range(3)]
        assert [h is not None for h in held] == fits
        assert sum(h.nbytes for h in held if h is not None) <= bound


def test_tiers_fill_in_their_order(tmp_path):
    memory, file = MemoryTier(36), FileTier(72, tmp_path)
    kept = ActivationStore([memory, file])
    assert [kept.put((i,), made(3, seed=i)) for i in range(4)] == [True, True, False, False]
    assert memory.get((0,)) is not None
    assert torch.equal(file.get((1,)), made(3, seed=1))


def test_the_file_has_no_name(tmp_path):
    file = FileTier(1 << 20, tmp_path)
    file.put((1,), made(3))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_keeping_and_not_the_run(tmp_path, monkeypatch):
    file = FileTier(1 << 20, tmp_path)
    assert file.put((1,), made(3))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert not file.put((2,), made(3))
    monkeypatch.undo()
    assert not file.put((3,), made(3))
    assert torch.equal(file.get((1,)), made(3))


def test_what_the_system_writes_piece_by_piece_comes_back_whole(tmp_path, monkeypatch):
    """Linux writes at most 2 GiB at a time; here it is seven bytes."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, bytes(data[:7]), offset))
    file = FileTier(max_bytes=400, folder=tmp_path)
    values = [torch.randn(5, 9), torch.arange(20).bfloat16()]
    for i, value in enumerate(values):
        assert file.put((i,), value)
    assert all(torch.equal(file.get((i,)), value) for i, value in enumerate(values))
