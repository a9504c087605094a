"""What a file says is text: on a terminal it is neither obeyed nor taken for a line of ours; errors are sentences."""

import json

import pytest

from zotune.ledger import Header, Layout, LedgerWriter
from zotune.ledger.replay import describe
from zotune.llm.models.random_models import ARCHITECTURES

FORGED = "all 14 saved tensors are the ledger's, bit for bit"
HOSTILE = f"\x1b]0;owned\x07\x1b[2J\r\n{FORGED}\u202e"


@pytest.fixture
def hostile_ledger(tmp_path):
    """A ledger whose header names its model, method and versions as an attacker would."""
    import torch

    import zotune as zo

    method = describe(zo.zo_sgd(torch.nn.Linear(1, 1), lr=0.1))
    about = {"config": {"model": HOSTILE, "method": HOSTILE, "tuning": HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    LedgerWriter.create(tmp_path / "f.zol", Header(Layout(1, 1, 1), method, [], about)).close()
    return tmp_path / "f.zol"


@pytest.mark.parametrize("command", ["show", "verify", "replay"])
def test_a_ledgers_header_moves_no_cursor_and_forges_no_line(zotune, hostile_ledger, tmp_path, command):
    more = ["--output-dir", tmp_path / "out"] if command == "replay" else []
    said = zotune("ledger", command, hostile_ledger, *more)
    assert not {"\x1b", "\x07", "\r", "\u202e"} & {*said.out, *said.err}
    assert FORGED not in said.out.splitlines()
    if command == "show":
        assert r"model: \x1b]0;owned\x07\x1b[2J\r\n" in said.out


@pytest.mark.parametrize("verb", ["eval", "train"])
def test_messages_about_a_folder_move_no_cursor(zotune, tmp_path, rows_file, verb):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps({"model_type": HOSTILE, "architectures": [HOSTILE]}))
    said = zotune(verb, "--model", tmp_path / "m", f"--{verb}-file", rows_file, "--device", "cpu")
    assert said.code == 2
    assert r"\x1b" in said.err
    assert "\x1b" not in said.err + said.out


@pytest.mark.parametrize("error", [TypeError, RuntimeError, IndexError, RecursionError, AssertionError])
def test_an_unforeseen_error_is_told_with_the_way_to_it_and_exit_code_1(zotune, monkeypatch, error):
    def fails(*_):
        raise error(HOSTILE)

    monkeypatch.setattr("zotune.cli.listings.tasks", fails)
    said = zotune("tasks")
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("zotune: an unforeseen error")
    assert f"in {fails.__name__}" in said.err
    assert "\x1b" not in said.err


def test_plan_takes_a_models_name_as_text_and_not_as_markup(zotune, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "[/red]\x1b[2J", ARCHITECTURES["opt-tiny"])
    said = zotune("plan", "--model", "random:[/red]\x1b[2J", "--method", "zo_sgd")
    assert said.code == 0, said.err
    assert r"random:[/red]\x1b[2J" in said.out
