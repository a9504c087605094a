"""The tree keeps its order: folders stay small, imports go one way, files and functions stay short."""

import ast
from collections import Counter, defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "zotune"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES})

# Lowest first: a package imports packages before it in its line, never one after it.
LINES = {
    "zotune": (
        *("errors", "messages", "system", "noise", "model", "directions", "estimate", "apply", "optim", "methods"),
        *("ledger", "llm", "plan", "bench", "cli"),
    ),
    "zotune.llm": ("config", "data", "quantized", "checkpoints", "models", "scoring", "tasks", "training", "ledger"),
    "zotune.bench": ("spec", "results", "measure", "run", "report"),
}
MAX_MODULES, MAX_LINES, MAX_FUNCTION = 15, 300, 50


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


def imports_of(path):
    """The modules of the package that a module imports, anywhere in it, for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "zotune":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in NAMES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "zotune"}
    return found & NAMES.keys()


# The top package names everything lazily, and every module may ask it for the version.
IMPORTS = {name: imports_of(path) - {"zotune"} for name, path in NAMES.items() if name != "zotune"}


def lines_of_code(lines, node):
    """Lines of a syntax tree that are neither blank nor comment nor docstring."""
    documented = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and inner.body:
            first = inner.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                documented |= set(range(first.lineno, first.end_lineno + 1))
    start, stop = (node.lineno, node.end_lineno) if hasattr(node, "lineno") else (1, len(lines))
    numbered = enumerate(lines[start - 1 : stop], start)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in documented for i, line in numbered)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(PACKAGE.parent).as_posix())
def test_a_folder_holds_few_modules(folder):
    if folder != PACKAGE / "llm" / "tasks":  # one module a task
        assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) <= MAX_MODULES


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(PACKAGE.parent).as_posix())
def test_a_package_says_what_lives_there(folder):
    assert len(ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "") > 60


@pytest.mark.parametrize("package", LINES)
def test_imports_go_one_way(package):
    depth, order = package.count(".") + 1, LINES[package]
    rank = {part: i for i, part in enumerate(order)}
    backwards = []
    for name, imported in IMPORTS.items():
        if name.startswith(f"{package}."):
            part = name.split(".")[depth]
            for other in imported:
                parts = other.split(".")
                if other.startswith(f"{package}.") and rank.get(parts[depth], -1) > rank.get(part, len(order)):
                    backwards.append(f"{name} imports {other}")
    assert backwards == []
    packages = {p.parent.name for p in NAMES[package].parent.glob("*/__init__.py")}
    assert packages <= set(order), "a new package has to be given its place in the line"


def test_no_module_imports_in_a_circle():
    packages = {name for name, path in NAMES.items() if path.name == "__init__.py"}
    graph = defaultdict(set)
    for name, imported in IMPORTS.items():
        # A package that re-exports its modules is not imported by them.
        graph[name] = {other for other in imported if not (other in packages and name.startswith(f"{other}."))}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_are_short(name):
    source = NAMES[name].read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    assert lines_of_code(lines, tree) <= MAX_LINES
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {f.name: n for f in functions if (n := lines_of_code(lines, f)) > MAX_FUNCTION} == {}


def test_the_core_imports_torch_and_numpy_alone():
    allowed = {"torch", "numpy", "triton", "zotune"}
    foreign = Counter()
    for name, path in NAMES.items():
        if name.split(".")[1:2] and name.split(".")[1] in ("llm", "plan", "bench", "cli", "integrations"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            foreign.update({n.split(".")[0] for n in names} - allowed - _standard_library())
    assert foreign == {}


def _standard_library():
    import sys

    return sys.stdlib_module_names


def test_tests_mirror_the_package():
    tests = Path(__file__).parent
    folders = {p.parent.relative_to(tests) for p in tests.rglob("test_*.py")} - {Path("."), Path("docs"), Path("speed")}
    assert {f for f in folders if not (PACKAGE / f).is_dir()} == set()


def test_numba_is_gone():
    assert not any("numba" in path.read_text(encoding="utf-8") for path in MODULES)
