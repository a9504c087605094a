"""The hash of the code that some functions run, independent of its place and of the names of definitions.

The hash covers the syntax of the functions and of all definitions that they refer to, without docstrings, comments,
layout, import statements, unused annotations, and the texts of errors, warnings and option descriptions. A reference to
a definition of the package counts by the content of that definition, a reference to a library by its full name. So a
definition may move to another module or change its name; modules may be split, merged or renamed.

The hash changes without need if a method, parameter, attribute or local variable is renamed, or if the same computation
is written differently. It does not see definitions that are looked up by their names as text, subclasses and
registrations in modules to which nothing refers, the `__name__` of a definition, and files in other languages than
Python and C.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from zotune.bench.keys.code_modules import Definition, Package
from zotune.bench.keys.code_reader import Reader, Reference

COUNTS_FOR_RESULTS = "never"
# The number of steps that a reference is followed to distinguish it from others.
_ROUNDS = 4
_C_COMMENT = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|//[^\n]*|/\*.*?\*/""", re.DOTALL)


@cache
def code_hash(folder: Path, roots: tuple[str, ...], *, on_cpu: bool = False) -> str:
    """The hash, 16 hexadecimal digits, of the code that functions of a package run.

    Args:
        folder: folder of the package; its name is the package's name in imports.
        roots: names of functions; each must be defined in exactly one module of the package.
        on_cpu: leave out code that only a GPU runs.

    Raises:
        LookupError: no module or several modules define a root.
    """
    reached = _reached(_package(folder), roots, on_cpu)
    alone = {one: _hash(t if isinstance(t, str) else "→" for t in tokens) for one, tokens in reached.items()}
    leads = {one: [t for t in tokens if isinstance(t, Reference)] for one, tokens in reached.items()}
    known = alone
    for _ in range(_ROUNDS):
        known = {one: _hash([alone[one], *(_of(t, known) for t in leads[one])]) for one in reached}
    c_sources = sorted(_without_comments(path.read_text(encoding="utf-8")) for path in folder.rglob("*.c"))
    return _hash([*sorted(set(known.values())), *c_sources])


def code_stamp(folder: Path) -> frozenset[tuple[str, int, int]]:
    """Name, time and size of each file that `code_hash` reads; with equal stamps hashes are equal."""
    files = [path for path in folder.rglob("*.*") if path.suffix in (".py", ".c")]
    return frozenset((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files)


def _of(reference: Reference, known: dict[Definition, str]) -> str:
    return " ".join(sorted(f"{name}:{known[one]}" for name, one in reference.named))


@cache
def _package(folder: Path) -> Package:
    return Package(folder)


def _reached(package: Package, roots: Sequence[str], on_cpu: bool) -> dict[Definition, list[str | Reference]]:
    """The tokens of all definitions that can be reached from the roots."""
    waiting = [one for name in roots for one in package.find(name)]
    reached: dict[Definition, list[str | Reference]] = {}
    while waiting:
        one = waiting.pop()
        if one in reached:
            continue
        reached[one] = tokens = _read(package, one, on_cpu)
        waiting += [other for token in tokens if isinstance(token, Reference) for _, other in token.named]
        waiting += one.module.effects
    return reached


@cache
def _read(package: Package, one: Definition, on_cpu: bool) -> list[str | Reference]:
    return Reader(package, one.module, on_cpu).read(one.node)


def _without_comments(source: str) -> str:
    lines = _C_COMMENT.sub(lambda match: match[1] or " ", source).splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]
