"""The modules of a package as syntax trees: which definition a name refers to, through any number of imports.

A definition is a statement of a module: a function, a class, or an assignment. No module is imported or run. Star
imports and names from a module's `__getattr__` are not followed; a package with such names imports them under
TYPE_CHECKING, which is followed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

# A module sets this name where its definitions do not count for results: "never" (it shows, and computes nothing), or
# "on cuda" (nothing on a CPU passes through it).
MARKER = "COUNTS_FOR_RESULTS"
COUNTS_FOR_RESULTS = "never"
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
_SCOPE = _FUNCTION | ast.ClassDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@dataclass(frozen=True, eq=False)
class Definition:
    """A statement of a module."""

    module: Module
    node: ast.stmt


class Target(NamedTuple):
    """The target of a path: definitions or a module of the package, and the remaining attributes.

    Without definitions and module, the path refers to another package.
    """

    definitions: tuple[Definition, ...] = ()
    module: Module | None = None
    rest: tuple[str, ...] = ()


@dataclass(eq=False)
class Module:
    """A module and the names that its statements bind.

    Attributes:
        definitions: by name; a name that is assigned twice has two.
        imports: from imported names to their paths, in the form of `imported`.
        effects: statements that bind no name, or only in a branch; they count if any definition of the module does.
        main: statements that run if the module is run as a program.
        counts: "always", or the value of its marker.
    """

    name: str
    is_package: bool
    source: str
    definitions: dict[str, list[Definition]] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)
    effects: list[Definition] = field(default_factory=list)
    main: list[Definition] = field(default_factory=list)
    counts: str = "always"

    def __post_init__(self) -> None:
        for node in ast.parse(self.source).body:
            self._add(node)

    def _add(self, node: ast.stmt) -> None:
        one = Definition(self, node)
        if isinstance(node, _FUNCTION | ast.ClassDef):
            self.definitions.setdefault(node.name, []).append(one)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            self.imports |= imported(node, self)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            names = bound_by([node], self)
            for name in names:
                self.definitions.setdefault(name, []).append(one)
            if not names:
                self.effects.append(one)
            elif MARKER in names and isinstance(node.value, ast.Constant):
                self.counts = str(node.value.value)
        else:
            self._add_other(one)

    def _add_other(self, one: Definition) -> None:
        """Add a branch, a loop or an expression."""
        test = ast.dump(one.node.test) if isinstance(one.node, ast.If) else ""
        for name, path in bound_by([one.node], self).items():
            if path is None:
                self.definitions.setdefault(name, []).append(one)
            else:
                self.imports.setdefault(name, path)
        if "__main__" in test:
            self.main.append(one)
        elif "TYPE_CHECKING" not in test and not is_text(one.node):
            self.effects.append(one)

    def base_of(self, node: ast.ImportFrom) -> str:
        """The dotted path from which a statement imports names."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        kept = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*kept, *filter(None, [node.module])])


class Package:
    """All modules below a folder, whose name is the package's; each is read when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = folder.name, folder
        self._paths: dict[str, Path] = {}
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            inner = parts[:-1] if parts[-1] == "__init__" else parts
            self._paths[".".join([self.name, *inner])] = path
        self._folders = {name for path in self._paths for name in _above(path)}
        self._modules: dict[str, Module] = {}

    @cached_property
    def sources(self) -> dict[str, str]:
        """The text of each module by its dotted name."""
        return {name: path.read_text(encoding="utf-8") for name, path in self._paths.items()}

    def module(self, name: str) -> Module | None:
        """The module or folder with a dotted name; None if there is none."""
        if name not in self._modules:
            if name in self._paths:
                is_package = self._paths[name].name == "__init__.py"
                self._modules[name] = Module(name, is_package, self.sources[name])
            elif name in self._folders:
                self._modules[name] = Module(name, True, "")
        return self._modules.get(name)

    def find(self, name: str) -> tuple[Definition, ...]:
        """Find a function by its name in all modules.

        Raises:
            LookupError: no module or several modules define the function.
        """
        pattern = re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.MULTILINE)
        places = [module for module, source in self.sources.items() if pattern.search(source)]
        if len(places) != 1:
            where = ", ".join(places) or "no module"
            raise LookupError(f"the content key needs one function {name} in {self.name}, but {where} defines it")
        module = self.module(places[0])
        assert module is not None
        return tuple(module.definitions[name])

    def resolve(self, path: str) -> Target:
        """Follow a path (`MODULE:NAME.ATTRIBUTE`, in the form of `imported`) through imports to its target."""
        dotted, _, names = path.partition(":")
        module, rest = self.module(dotted), list(filter(None, names.split(".")))
        while module is not None and rest:
            name, *after = rest
            if name in module.definitions:
                return Target(definitions=tuple(module.definitions[name]), rest=tuple(after))
            alias, inner = module.imports.get(name), f"{module.name}.{name}"
            if alias is not None and alias != f"{module.name}:{name}":
                return self.resolve(joined(alias, after))
            if self.module(inner) is None:
                return Target(rest=tuple(rest))
            module, rest = self.module(inner), after
        return Target(module=module, rest=tuple(rest))


def _above(name: str) -> Iterator[str]:
    """The dotted names of the packages above a module."""
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


def joined(path: str, attributes: Sequence[str]) -> str:
    """The path extended by attributes.

    >>> joined("a.b:", ["c"]), joined("a.b:c", ["d"])
    ('a.b:c', 'a.b:c.d')
    """
    module, _, names = path.partition(":")
    return f"{module}:{'.'.join([*filter(None, [names]), *attributes])}"


def is_text(node: ast.AST) -> bool:
    """Whether a statement is a docstring or another unused constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def imported(node: ast.Import | ast.ImportFrom, module: Module) -> dict[str, str]:
    """The names that an import binds, each with its path: `MODULE:NAME`, or `MODULE:` for a module.

    >>> here = Module("a.b", False, "")
    >>> imported(ast.parse("import x.y").body[0], here), imported(ast.parse("from . import c as d").body[0], here)
    ({'x': 'x:'}, {'d': 'a:c'})
    """
    if isinstance(node, ast.ImportFrom):
        base = module.base_of(node)
        return {alias.asname or alias.name: f"{base}:{alias.name}" for alias in node.names}
    return {a.asname or a.name.split(".")[0]: f"{a.name if a.asname else a.name.split('.')[0]}:" for a in node.names}


def bound_by(nodes: Sequence[ast.AST], module: Module) -> dict[str, str | None]:
    """The names that statements bind in their own scope, each with its path if it is imported, else None.

    >>> bound_by(ast.parse("from x import y; z = [a for a in y]").body, Module("m", False, ""))
    {'y': 'x:y', 'z': None}
    """
    found: dict[str, str | None] = {}
    outer: set[str] = set()
    for node in _in_scope(nodes):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= imported(node, module)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            outer |= set(node.names)
        else:
            found |= dict.fromkeys(_names_of(node))
    return {name: path for name, path in found.items() if name not in outer}


def _names_of(node: ast.AST) -> Iterator[str]:
    """The names that a node itself binds."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id
    elif isinstance(node, _FUNCTION | ast.ClassDef | ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        yield node.name
    elif isinstance(node, ast.MatchMapping) and node.rest:
        yield node.rest
    elif isinstance(node, ast.arg):
        yield node.arg


def _in_scope(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Yield all nodes except those of inner scopes; of comprehensions the names that := binds outside."""
    waiting: list[ast.AST] = list(reversed(nodes))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, _SCOPE):
            waiting += reversed(list(ast.iter_child_nodes(node)))
        elif not isinstance(node, _FUNCTION | ast.ClassDef | ast.Lambda):
            yield from (n.target for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
