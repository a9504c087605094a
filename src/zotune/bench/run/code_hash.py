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

import ast
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from zotune.bench.run.code_modules import Definition, Module, Package, bound_by, is_text, joined

COUNTS_FOR_RESULTS = "never"
# The number of steps that a reference is followed to distinguish it from others.
_ROUNDS = 4
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
_COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SKIPPED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
_C_COMMENT = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|//[^\n]*|/\*.*?\*/""", re.DOTALL)


@dataclass(frozen=True)
class _Reference:
    """The definitions that a name refers to; for a module as a value all its definitions with their names."""

    named: tuple[tuple[str, Definition], ...]


@dataclass(frozen=True)
class _Scope:
    """The names bound in a function or a class; imported names have their paths."""

    names: dict[str, str | None]
    is_class: bool = False


_Scopes = tuple[_Scope, ...]


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
    leads = {one: [t for t in tokens if isinstance(t, _Reference)] for one, tokens in reached.items()}
    known = alone
    for _ in range(_ROUNDS):
        known = {one: _hash([alone[one], *(_of(t, known) for t in leads[one])]) for one in reached}
    c_sources = sorted(_without_comments(path.read_text(encoding="utf-8")) for path in folder.rglob("*.c"))
    return _hash([*sorted(set(known.values())), *c_sources])


def _of(reference: _Reference, known: dict[Definition, str]) -> str:
    return " ".join(sorted(f"{name}:{known[one]}" for name, one in reference.named))


@cache
def _package(folder: Path) -> Package:
    return Package(folder)


def _reached(package: Package, roots: Sequence[str], on_cpu: bool) -> dict[Definition, list[str | _Reference]]:
    """The tokens of all definitions that can be reached from the roots."""
    waiting = [one for name in roots for one in package.find(name)]
    reached: dict[Definition, list[str | _Reference]] = {}
    while waiting:
        one = waiting.pop()
        if one in reached:
            continue
        reached[one] = tokens = _read(package, one, on_cpu)
        waiting += [other for token in tokens if isinstance(token, _Reference) for _, other in token.named]
        waiting += one.module.effects
    return reached


@cache
def _read(package: Package, one: Definition, on_cpu: bool) -> list[str | _Reference]:
    return _Reader(package, one.module, on_cpu).read(one.node)


class _Reader:
    """Turns a statement of a module into tokens and references."""

    def __init__(self, package: Package, module: Module, on_cpu: bool) -> None:
        self._package, self._module = package, module
        self._left_out = {"never", "on cuda"} if on_cpu else {"never"}
        self._out: list[str | _Reference] = []
        self._is_message = False

    def read(self, node: ast.stmt) -> list[str | _Reference]:
        self._any(node, ())
        return self._out

    def _any(self, node: ast.AST | None, scopes: _Scopes) -> None:
        read = _READERS.get(type(node), _Reader._plain)
        read(self, node, scopes)

    def _plain(self, node: Any, scopes: _Scopes) -> None:
        """Read a node all of whose fields count."""
        self._out.append(type(node).__name__)
        for name, value in ast.iter_fields(node) if isinstance(node, ast.AST) else ():
            if name in _SKIPPED:
                continue
            if isinstance(value, list):
                self._all(value, scopes)
            elif isinstance(value, ast.AST):
                self._any(value, scopes)
            else:
                self._out.append(repr(value))

    def _all(self, nodes: Sequence[Any], scopes: _Scopes) -> None:
        self._out.append("[")
        for node in nodes:
            if isinstance(node, ast.AST | None):
                if not self._is_nothing(node, scopes):
                    self._any(node, scopes)
            else:
                self._out.append(repr(node))
        self._out.append("]")

    def _is_nothing(self, node: ast.AST | None, scopes: _Scopes) -> bool:
        """Whether a statement computes nothing: a docstring, an import, or a call that only shows something."""
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            return self._shows(node.value.func, scopes)
        if isinstance(node, ast.AnnAssign) and node.value is None:
            return not (scopes and scopes[-1].is_class)
        return isinstance(node, ast.Import | ast.ImportFrom | ast.Pass) or (node is not None and is_text(node))

    # Names --------------------------------------------------------------------------------------------------

    def _path(self, node: ast.AST, scopes: _Scopes) -> str | None:
        """The path to which a name or its attributes refer; None for names that are bound in a function."""
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        base = self._base(node.id, scopes)
        return None if base is None else joined(base, attributes)

    def _base(self, name: str, scopes: _Scopes) -> str | None:
        for i, scope in enumerate(reversed(scopes)):
            if name in scope.names and not (scope.is_class and i):
                return scope.names[name]
        if name in self._module.definitions and name not in self._module.imports:
            return f"{self._module.name}:{name}"
        return self._module.imports.get(name)

    def _name(self, node: ast.Name | ast.Attribute, scopes: _Scopes) -> None:
        path = self._path(node, scopes)
        if path is not None:
            self._refer(path)
        elif isinstance(node, ast.Name):
            self._out.append(node.id)
        else:
            self._plain(node, scopes)

    def _refer(self, path: str) -> None:
        target = self._package.resolve(path)
        name = path.replace(":", ".").strip(".")
        is_own = name.split(".")[-1].startswith("__")
        if target.definitions and not is_own:
            if target.definitions[0].module.counts in self._left_out:
                self._out.append("not counted")
            else:
                self._out.append(_Reference(tuple(("", one) for one in target.definitions)))
            self._out += [f".{attribute}" for attribute in target.rest]
        elif target.module is not None and not is_own:
            self._refer_to_module(target.module)
        else:
            self._out.append(name.split(".")[-1] if name.startswith(f"{self._package.name}.") else name)

    def _refer_to_module(self, module: Module, *, runs: bool = False) -> None:
        """Refer to a module as a value, through which any of its public names can be used."""
        if module.counts in self._left_out:
            self._out.append("not counted")
            return
        public = [(name, one) for name, some in module.definitions.items() if name[0] != "_" for one in some]
        self._out.append(_Reference(tuple([("", one) for one in module.main] if runs else public)))

    def _shows(self, node: ast.AST, scopes: _Scopes) -> bool:
        """Whether a name belongs to a module whose code never counts."""
        path = self._path(node, scopes)
        target = self._package.resolve(path) if path else None
        return bool(target and target.definitions and target.definitions[0].module.counts == "never")

    # Kinds of nodes -----------------------------------------------------------------------------------------

    def _call(self, node: ast.Call, scopes: _Scopes) -> None:
        if self._shows(node.func, scopes):
            self._out.append("not counted")
            return
        path = self._path(node.func, scopes)
        if path == "pydantic:Field":
            node = ast.Call(node.func, node.args, [k for k in node.keywords if k.arg != "description"])
        with_message = self._is_message
        self._is_message = with_message or path == "warnings:warn"
        self._plain(node, scopes)
        self._is_message = with_message

    def _raise(self, node: ast.Raise, scopes: _Scopes) -> None:
        self._is_message = True
        self._plain(node, scopes)
        self._is_message = False

    def _assert(self, node: ast.Assert, scopes: _Scopes) -> None:
        self._out.append("Assert")
        self._any(node.test, scopes)

    def _constant(self, node: ast.Constant, scopes: _Scopes) -> None:
        value = node.value
        if isinstance(value, str):
            if self._is_message and " " in value:
                self._out.append("text")
                return
            module = self._package.module(value) if value.startswith(f"{self._package.name}.") else None
            if module is not None:  # `python -m`: a process of its own
                self._refer_to_module(module, runs=True)
                return
        self._out.append(f"{type(value).__name__} {value!r}")

    def _text(self, node: ast.JoinedStr, scopes: _Scopes) -> None:
        if self._is_message:
            self._out.append("text")
        else:
            self._plain(node, scopes)

    def _assigned(self, node: ast.AnnAssign, scopes: _Scopes) -> None:
        """Read an annotated assignment; its annotation counts in classes, where it defines a field."""
        self._out.append("Assign")
        self._any(node.target, scopes)
        if scopes and scopes[-1].is_class:
            self._any(node.annotation, scopes)
        self._any(node.value, scopes)

    def _assign(self, node: ast.Assign, scopes: _Scopes) -> None:
        self._out.append("Assign")
        for target in node.targets:
            self._any(target, scopes)
        self._any(node.value, scopes)

    def _class(self, node: ast.ClassDef, scopes: _Scopes) -> None:
        self._out += ["ClassDef", node.name if scopes else ""]
        for part in (node.decorator_list, node.bases, node.keywords):
            self._all(part, scopes)
        self._all(node.body, (*scopes, _Scope(bound_by(node.body, self._module), is_class=True)))

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, scopes: _Scopes) -> None:
        """Read a function; its annotations count if it has a decorator, which may read them."""
        self._out += [type(node).__name__, node.name if scopes else ""]
        self._all(node.decorator_list, scopes)
        self._arguments(node.args, scopes, annotated=bool(node.decorator_list))
        self._all(node.body, (*scopes, _Scope(bound_by([node.args, *node.body], self._module))))

    def _lambda(self, node: ast.Lambda, scopes: _Scopes) -> None:
        self._out.append("Lambda")
        self._arguments(node.args, scopes, annotated=False)
        self._any(node.body, (*scopes, _Scope(bound_by([node.args], self._module))))

    def _arguments(self, node: ast.arguments, scopes: _Scopes, *, annotated: bool) -> None:
        star, stars = [node.vararg] * (node.vararg is not None), [node.kwarg] * (node.kwarg is not None)
        for group in (node.posonlyargs, node.args, star, node.kwonlyargs, stars):
            self._out.append("|")
            for one in filter(None, group):
                self._out.append(one.arg)
                if annotated:
                    self._any(one.annotation, scopes)
        self._all(node.defaults, scopes)
        self._all(node.kw_defaults, scopes)

    def _comprehension(self, node: ast.AST, scopes: _Scopes) -> None:
        targets = [g.target for g in ast.iter_child_nodes(node) if isinstance(g, ast.comprehension)]
        self._plain(node, (*scopes, _Scope(bound_by(targets, self._module))))


_READERS: dict[type, Callable[[_Reader, Any, _Scopes], None]] = {
    ast.Name: _Reader._name,
    ast.Attribute: _Reader._name,
    ast.Call: _Reader._call,
    ast.Raise: _Reader._raise,
    ast.Assert: _Reader._assert,
    ast.Constant: _Reader._constant,
    ast.JoinedStr: _Reader._text,
    ast.Assign: _Reader._assign,
    ast.AnnAssign: _Reader._assigned,
    ast.ClassDef: _Reader._class,
    ast.FunctionDef: _Reader._function,
    ast.AsyncFunctionDef: _Reader._function,
    ast.Lambda: _Reader._lambda,
    **dict.fromkeys(_COMPREHENSION, _Reader._comprehension),
}


def _without_comments(source: str) -> str:
    lines = _C_COMMENT.sub(lambda match: match[1] or " ", source).splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]
