"""The trackers of `report_to`: transformers' own callbacks for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

from zotune.errors import UsageError
from zotune.llm.config.output import TRACKERS

# The modules that a tracker's callback imports, any one of which suffices.
_MODULES = {name: (name,) for name in TRACKERS} | {"tensorboard": ("tensorboard", "tensorboardX")}


def check_installed(report_to: Sequence[str]) -> None:
    """Check that the packages of the trackers are installed.

    Raises:
        UsageError: one is not; the message names the command that installs it.
    """
    missing = [name for name in report_to if not any(find_spec(module) for module in _MODULES[name])]
    if missing:
        raise UsageError(
            f"report_to: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; run "
            f"pip install 'zotune[{','.join(missing)}]', or leave the name out of --report-to."
        )


def all_callbacks(report_to: Sequence[str], callbacks: Iterable[Any] = ()) -> list[Any]:
    """Return the callbacks of the trackers, and behind them the given ones; a class stands for its instance.

    Raises:
        UsageError: a tracker is not installed, or a callback is none.
    """
    from transformers import TrainerCallback

    check_installed(report_to)
    found = [*_tracker_callbacks(report_to)]
    for callback in callbacks:
        instance = callback() if isinstance(callback, type) else callback
        if not isinstance(instance, TrainerCallback):
            raise UsageError(
                f"callbacks holds {instance!r}, which is no callback: derive its class from "
                "transformers.TrainerCallback, and give an instance of it."
            )
        found.append(instance)
    return found


def _tracker_callbacks(report_to: Sequence[str]) -> list[Any]:
    if not report_to:
        return []
    from transformers.integrations import get_reporting_integration_callbacks

    return [callback() for callback in get_reporting_integration_callbacks(list(report_to))]
