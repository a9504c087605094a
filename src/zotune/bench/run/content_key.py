"""What a result is a result of: one hash over config, code, data and libraries.

Code counts by what it does: its syntax tree without docstrings, so that a comment, a docstring or a reformatted line
leaves results as they are. What only starts runs or shows results does not count.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2]
# The modules of the benchmark that compute; the others run them and show what came of it.
COMPUTING = frozenset({"accuracy.py", "measure.py", "measured.py", "quality.py", "search.py", "theory.py", "worker.py"})
# Commands, and modules that no run passes through.
_SHOWING = frozenset({"cli.py", "ledger_commands.py", "llm/dry_run.py", "llm/progress.py"})
# What steps pass through that are measured, with what is foretold of them, and nothing else; what only a GPU runs.
_MEASURING = (
    *("bench/measure", "bench/theory.py", "plan/"),
    *(f"llm/{name}.py" for name in ("footprint", "live_memory", "passes", "skeleton", "workload")),
)
_ON_GPU = ("graphs.py", "noise/gpu.py", "noise/triton_kernels.py")
_LIBRARIES = ("torch", "transformers", "peft", "numpy")


def key_of(config: Mapping[str, Any], code: str | None = None) -> str:
    """The hash, 16 hexadecimal digits, of a config run by the code and the libraries of today.

    >>> key_of({"task": "sst2"}) == key_of({"task": "sst2"}) != key_of({"task": "rte"})
    True
    """
    parts = {
        "config": config,
        "code": code_hash(unused=unused_by(config)) if code is None else code,
        "data": _data_hash(str(config.get("task"))),
        "libraries": _versions(),
    }
    return _hash([json.dumps(parts, sort_keys=True).encode()])


def unused_by(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Beginnings of the names of modules that such a cell or job does not pass through.

    >>> unused_by({"kind": "accuracy", "device": "cuda"})[:3]
    ('bench/measure', 'bench/theory.py', 'plan/')
    """
    measures = config.get("does") == "step" or config.get("kind") in ("memory", "time", "theory")
    return (() if measures else _MEASURING) + (_ON_GPU if config.get("device") == "cpu" else ())


@cache
def code_hash(package: Path = PACKAGE, unused: tuple[str, ...] = ()) -> str:
    """The hash of the code below a folder that computes results, less what of it is not used."""
    return _hash(_code(package, unused))


def _code(package: Path, unused: tuple[str, ...]) -> Iterator[bytes]:
    for path in sorted(package.rglob("*")):
        place = path.relative_to(package).as_posix()
        if place.startswith(unused):
            continue
        if path.suffix == ".c":
            yield place.encode() + path.read_bytes()
        elif path.suffix == ".py" and _computes(place):
            yield place.encode() + tree_of(path.read_text(encoding="utf-8")).encode()


def _computes(place: str) -> bool:
    in_bench = place.startswith("bench/")
    return (not in_bench and place not in _SHOWING) or (in_bench and place.removeprefix("bench/") in COMPUTING)


def tree_of(source: str) -> str:
    """The syntax tree of Python code without its docstrings, as text.

    >>> tree_of("def f(): 'Says so.'; return 1  # one") == tree_of("def f(): return 1")
    True
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return ast.dump(tree)


@cache
def _data_hash(task: str) -> str:
    """The hash of a task's rows that are shipped, where there are some."""
    folders = [folder / task for folder in (PACKAGE.parents[1] / "data", PACKAGE / "llm" / "tasks" / "data")]
    files = [p for folder in folders if folder.is_dir() for p in sorted(folder.glob("*.jsonl*"))]
    return _hash(path.read_bytes() for path in files)


@cache
def _versions() -> dict[str, str]:
    """Of the libraries that numbers depend on; "none" where one is not installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
