from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zotune.llm.config.step import ModelOptions
from zotune.llm.models import load as loading
from zotune.system import processor


def flags() -> set[str]:
    """Return what the kernel says of the first processor: another source than torch's."""
    line = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return set(line.split()[2:])


@pytest.mark.skipif(not flags(), reason="the kernel lists no flags of this processor")
def test_bfloat16_is_emulated_where_the_kernel_lists_no_instruction_for_it() -> None:
    assert processor.emulates(torch.bfloat16) is not bool({"avx512_bf16", "amx_bf16"} & flags())
    assert not processor.emulates(torch.float32)


def test_nothing_is_said_against_a_processor_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    assert not processor.emulates(torch.bfloat16)


@pytest.mark.parametrize("is_emulated", [True, False])
def test_a_model_on_a_processor_that_emulates_its_precision_says_so_once(
    is_emulated: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loading._say_what_is_emulated.cache_clear()
    monkeypatch.setattr(loading, "emulates", lambda dtype: is_emulated and dtype == torch.bfloat16)
    for dtype in ("bfloat16", "bfloat16", "float32"):
        loading.load(ModelOptions(model="random:llama-tiny", dtype=dtype, device="cpu"))
    assert capsys.readouterr().err.count("--dtype float32") == is_emulated
    loading._say_what_is_emulated.cache_clear()
