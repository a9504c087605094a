"""A Hub that does not answer costs a command a moment, and not half a minute for each file."""

from __future__ import annotations

import time

import pytest
from huggingface_hub import constants

from zotune.errors import UsageError
from zotune.llm.checkpoints import adapter_source
from zotune.llm.checkpoints.adapter_source import find_adapter, without_waiting_for_the_hub
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing listens at port 9.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(adapter_source, "_asked", {})


def test_a_name_of_no_model_is_told_at_once() -> None:
    start = time.monotonic()
    assert find_adapter("nobody/nothing") is None
    with pytest.raises(UsageError, match="'nobody/nothing' is neither built in nor a folder, and the Hub cannot be"):
        load(ModelOptions(model="nobody/nothing", device="cpu"))
    assert time.monotonic() - start < 15
    # The setting of the process is as it was.
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_source, "_answers", lambda endpoint: endpoint == "http://127.0.0.1:9")
    with without_waiting_for_the_hub():
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with without_waiting_for_the_hub():
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE
