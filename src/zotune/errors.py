"""What zotune raises when it can say what is wrong and what to do about it.

The command line turns `UsageError` into exit code 2 and `RunError` into exit code 1; library users
can catch `ZotuneError` for both.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZotuneError(Exception):
    """Base of every error that zotune raises on purpose."""


class UsageError(ZotuneError, ValueError):
    """The request cannot work as it stands: a name, an option, a file or a value is wrong."""


class RunError(ZotuneError, RuntimeError):
    """A run that was well asked for failed on the way; what it had computed is kept."""


class NotWrittenError(RunError):
    """The disk is full or gone. What was written before is whole, and the run can go on from there."""


class UnreadTensorError(ZotuneError, RuntimeError):
    """A tuned tensor was not read by a forward pass, so its gradient estimate would be a silent zero."""


class NonFiniteLossError(RunError):
    """The objective was NaN or infinite several steps in a row."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt `name`: ` Did you mean 'x'?`, or the list of what there is.

    >>> did_you_mean("zo_sdg", ["zo_sgd", "fo_adam"])
    " Did you mean 'zo_sgd'?"
    >>> did_you_mean("xyz", ["zo_sgd", "fo_adam"])
    ' There is: fo_adam, zo_sgd.'
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" There is: {', '.join(names)}."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: Python's own, or torch's, which has no class of its own on a CPU.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("a wrong option"))
    (True, False)
    """
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)
