"""The errors that zotune raises on purpose: each says what is wrong, why, and what to do about it.

The command line turns `UsageError` into exit code 2 and the other errors into exit code 1. Users of the library
can catch `ZotuneError` for all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZotuneError(Exception):
    """Base class of every error that zotune raises on purpose."""


class UsageError(ZotuneError, ValueError):
    """A request cannot work as it stands: a name, an option, a file or a value is wrong."""


class RunError(ZotuneError, RuntimeError):
    """A correctly requested run failed on the way; its results so far are saved."""


class NotWrittenError(RunError):
    """A write failed because the disk is full or gone. Earlier files are intact, and the run can be resumed."""


class UnreadTensorError(ZotuneError, RuntimeError):
    """A forward pass did not read a tuned tensor, so its gradient estimate would silently be zero."""


class NonFiniteLossError(RunError):
    """The objective was NaN or infinite in several consecutive steps."""


class NonFiniteScoreError(RunError):
    """A row of an evaluation has scores that are no numbers, so it has no prediction and no loss."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for a misspelt `name`: ` Did you mean 'x'?`, or a list of the known names if none is near.

    >>> did_you_mean("zo_sdg", ["zo_sgd", "fo_adam"])
    " Did you mean 'zo_sgd'?"
    >>> did_you_mean("xyz", ["zo_sgd", "fo_adam"])
    ' There is: fo_adam, zo_sgd.'
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" There is: {listed(names, 100)}."


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return names as text: the first ones, and how many more there are.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def reason_of(error: BaseException) -> str:
    """Return what an error of a library says, as a part of a sentence: its first line, and its kind if that says more.

    >>> reason_of(ValueError("no such layer")), reason_of(TypeError("an int is needed")), reason_of(KeyError("size"))
    ('no such layer', 'an int is needed (TypeError)', "'size' (KeyError)")
    """
    text, kind = str(error).strip(), type(error).__name__
    if not text:
        return kind
    first = text.splitlines()[0]
    return first if isinstance(error, (ValueError, OSError)) or kind in first else f"{first} ({kind})"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out: Python's own, or torch's, which has no class on a CPU.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("a wrong option"))
    (True, False)
    """
    says = ("out of memory", "can't allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(text in str(error) for text in says)
