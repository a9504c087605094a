"""Libraries that warn at import are quiet before a command imports them."""

from __future__ import annotations

import logging
import subprocess
import sys


def test_a_command_quiets_libraries_before_it_imports_them() -> None:
    # The warnings come from imports, so the loggers are asked while nothing has imported their libraries.
    script = (
        "import logging, sys\n"
        "from zotune.cli.main import run\n"
        "run(['--version'])\n"
        "assert not {'torch', 'torchao', 'transformers'} & {*sys.modules}\n"
        "print([logging.getLogger(n).level for n in ('torchao', 'torch.utils._pytree', 'peft')])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == str([logging.ERROR] * 3)
