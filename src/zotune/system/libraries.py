"""The versions of installed libraries; each is read once."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version


@cache
def library_version(name: str) -> str:
    """Return the version of an installed library, for which importlib parses all of its metadata.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    return version(name)
