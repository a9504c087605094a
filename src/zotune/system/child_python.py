"""Processes of Python beside this one: they run the same package, and nothing of the folder that they start in.

Python looks for modules in the current folder first, for `python -m` and `python -c` alike. A `yaml.py` there, perhaps
in a folder that somebody else made, would run. With `-P` Python leaves that folder out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_SOURCE = Path(__file__).parents[2]


def python(*arguments: str) -> list[str]:
    """Return a command line of this Python without the current folder among the places of modules.

    >>> python("-m", "pip")[1:]
    ['-P', '-m', 'pip']
    """
    return [sys.executable, "-P", *arguments]


def python_path(source: Path | None = None) -> str:
    """Return a `PYTHONPATH` with which a child finds this package, or that of another source folder.

    Empty entries of the present `PYTHONPATH`, which stand for the current folder, are left out.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(source or _SOURCE), *filter(None, given)])
