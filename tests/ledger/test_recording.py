"""A ledger is of one run: what would be recorded into another's, or read from two, is refused before a step."""

import pytest
import torch

import zotune as zo
from ledger_runs import loss_of, network
from zotune.ledger import LedgerError, LedgerWriter, read
from zotune.ledger.replay import header_of, record_to, replay


def begun(path, steps=2):
    """The optimizer of a recorded run."""
    opt = zo.zo_adam(network(), lr=0.1)
    with LedgerWriter.create(path, header_of(opt)) as writer:
        record_to(writer, opt)
        for _ in range(steps):
            opt.step(loss_of(opt.tuned.model))
    return opt


def test_steps_of_other_weights_than_the_headers_are_not_recorded(tmp_path):
    opt = zo.zo_adam(network(), lr=0.1)
    with LedgerWriter.create(tmp_path / "a.zol", header_of(opt)) as writer:
        with torch.no_grad():
            next(opt.tuned.model.parameters()).add_(1)
        with pytest.raises(LedgerError, match="the digest of"):
            record_to(writer, opt)
    assert opt.on_step is None


def test_a_run_goes_on_in_its_ledger_only_after_a_replay(tmp_path):
    begun(tmp_path / "a.zol")
    opt = zo.zo_adam(network(), lr=0.1)
    writer, ledger = LedgerWriter.resume(tmp_path / "a.zol")
    with writer:
        with pytest.raises(LedgerError, match="holds 2 steps, but the optimizer has taken 0: replay"):
            record_to(writer, opt)
        record_to(writer, replay(opt, ledger))
        opt.step(loss_of(opt.tuned.model))
    assert len(read(tmp_path / "a.zol")) == 3


@pytest.mark.parametrize("between", [b"", b"\0" * 7], ids=["at once", "after torn bytes"])
def test_two_ledgers_in_one_file_are_not_read_as_the_first(between, tmp_path):
    begun(tmp_path / "a.zol")
    content = (tmp_path / "a.zol").read_bytes()
    (tmp_path / "b.zol").write_bytes(content + between + content)
    with pytest.raises(LedgerError, match=f"holds 2 steps, and at byte {len(content + between)} another ledger"):
        read(tmp_path / "b.zol")
