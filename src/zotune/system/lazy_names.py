"""A package's public names, imported at their first use, so that importing the package stays quick."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module

# Neither `typing` nor `__future__`, for the reason that `zotune/__init__.py` gives.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"


def lazy_names(package: str, home: Mapping[str, str]) -> "Callable[[str], Any]":
    """Return the `__getattr__` of a package.

    Args:
        package: the package's name.
        home: for each public name, the module that defines it, relative to the package.

    >>> get = lazy_names("zotune.plan", {"predict": "predict"})
    >>> get("predict").__module__
    'zotune.plan.predict'
    >>> get("foretell")
    Traceback (most recent call last):
    AttributeError: module 'zotune.plan' has no attribute 'foretell'
    """

    def get(name: str) -> "Any":
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home[name]}"), name)
        # Python looks here first, so the next use costs nothing.
        setattr(sys.modules[package], name, value)
        return value

    return get
