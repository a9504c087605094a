"""From a definition to what counts of it: tokens of its syntax, and references to other definitions."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zotune.bench.keys.code_modules import Definition, Module, Package, bound_by, is_text, joined

COUNTS_FOR_RESULTS = "never"
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
_COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SKIPPED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


@dataclass(frozen=True)
class Reference:
    """The definitions that a name refers to; for a module as a value all its definitions with their names."""

    named: tuple[tuple[str, Definition], ...]


@dataclass(frozen=True)
class _Scope:
    """The names bound in a function or a class; imported names have their paths."""

    names: dict[str, str | None]
    is_class: bool = False


_Scopes = tuple[_Scope, ...]


class Reader:
    """Turns a statement of a module into tokens and references.

    Args:
        package: the package of the module.
        module: the module.
        on_cpu: leave out code that only a GPU runs.
    """

    def __init__(self, package: Package, module: Module, on_cpu: bool) -> None:
        self._package, self._module = package, module
        self._left_out = {"never", "on cuda"} if on_cpu else {"never"}
        self._out: list[str | Reference] = []
        self._is_message = False

    def read(self, node: ast.stmt) -> list[str | Reference]:
        """Return the tokens and references of a statement."""
        self._any(node, ())
        return self._out

    def _any(self, node: ast.AST | None, scopes: _Scopes) -> None:
        read = _READERS.get(type(node), Reader._plain)
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
                self._out.append(Reference(tuple(("", one) for one in target.definitions)))
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
        self._out.append(Reference(tuple([("", one) for one in module.main] if runs else public)))

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


_READERS: dict[type, Callable[[Reader, Any, _Scopes], None]] = {
    ast.Name: Reader._name,
    ast.Attribute: Reader._name,
    ast.Call: Reader._call,
    ast.Raise: Reader._raise,
    ast.Assert: Reader._assert,
    ast.Constant: Reader._constant,
    ast.JoinedStr: Reader._text,
    ast.Assign: Reader._assign,
    ast.AnnAssign: Reader._assigned,
    ast.ClassDef: Reader._class,
    ast.FunctionDef: Reader._function,
    ast.AsyncFunctionDef: Reader._function,
    ast.Lambda: Reader._lambda,
    **dict.fromkeys(_COMPREHENSION, Reader._comprehension),
}
