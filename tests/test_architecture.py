"""The tree keeps its order: folders stay small, imports go one way, files and functions stay short."""

import ast
from collections import Counter, defaultdict
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "zotune"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first: a package imports packages before it in its line, never one after it.
LINES = {
    "zotune": (
        *("errors", "messages", "system", "noise", "model", "directions", "estimate", "apply", "optim", "methods"),
        *("ledger", "llm", "plan", "bench", "cli", "integrations"),
    ),
    "zotune.llm": (
        "config",
        "distributed",
        "data",
        "rows",
        "quantized",
        "checkpoints",
        "models",
        "scoring",
        "tasks",
        "inference",
        "callbacks",
        "search",
        "output",
        "sharing",
        "training",
        "tune",
        "ledger",
        "api",
    ),
    "zotune.bench": ("spec", "keys", "results", "measure", "run", "verify", "report"),
}
MAX_MODULES, MAX_LINES, MAX_FUNCTION = 15, 300, 50


class Tree:
    """The modules of a package below a folder: paths and imports by name."""

    def __init__(self, package):
        self.package, self.root = package, package.name
        self.paths = {self.name_of(path): path for path in sorted(package.rglob("*.py"))}
        self.folders = sorted({path.parent for path in self.paths.values()})

    @cached_property
    def imports(self):
        """By module; made when a test asks, for every process that collects tests makes a tree."""
        # The top package names everything lazily, and every module may ask it for the version.
        inner = (name for name in self.paths if name != self.root)
        return {name: self.imports_of(self.paths[name]) - {self.root} for name in inner}

    def name_of(self, path):
        parts = path.relative_to(self.package.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def imports_of(self, path):
        """The modules of the package that a module imports, anywhere in it, for types too."""
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == self.root:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found.add(full if full in self.paths else node.module)
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.split(".")[0] == self.root}
        return found & self.paths.keys()


TREE = Tree(PACKAGE)


def lines_of_code(lines):
    """How many lines are neither blank nor comment; a module's docstrings count, for a reader scrolls past them."""
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def lines_of_function(lines, function):
    """Lines of code of a function without its docstring and those of functions in it."""
    count = lines_of_code(lines[function.lineno - 1 : function.end_lineno])
    for inner in ast.walk(function):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = inner.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                count -= lines_of_code(lines[first.lineno - 1 : first.end_lineno])
    return count


def full_folders(tree):
    """Folders with more modules than a reader surveys; of tasks there is one module each."""
    count = {folder: sum(path.parent == folder for path in tree.paths.values()) - 1 for folder in tree.folders}
    return {
        folder.relative_to(tree.package).as_posix(): n
        for folder, n in count.items()
        if n > MAX_MODULES and folder != tree.package / "llm" / "tasks"
    }


def silent_packages(tree):
    """Packages that do not say what lives there."""
    texts = {f: ast.get_docstring(ast.parse((f / "__init__.py").read_text(encoding="utf-8"))) for f in tree.folders}
    return [folder.relative_to(tree.package).as_posix() for folder, text in texts.items() if len(text or "") <= 60]


def wrong_ways(tree, package, order):
    """Imports of a package by one before it in the line, and packages without a place in the line."""
    depth, rank = package.count(".") + 1, {part: i for i, part in enumerate(order)}
    found = []
    for name, imported in tree.imports.items():
        if name.startswith(f"{package}."):
            part = name.split(".")[depth]
            for other in imported:
                if other.startswith(f"{package}.") and rank.get(other.split(".")[depth], -1) > rank.get(
                    part, len(order)
                ):
                    found.append(f"{name} imports {other}")
    packages = {p.parent.name for p in tree.paths[package].parent.glob("*/__init__.py")}
    return found + [f"{package}.{name} has no place in the line" for name in sorted(packages - set(order))]


def circle(tree):
    """The modules of a circle of imports; none if there is none."""
    packages = {name for name, path in tree.paths.items() if path.name == "__init__.py"}
    graph = defaultdict(set)
    for name, imported in tree.imports.items():
        # A package that re-exports its modules is not imported by them.
        graph[name] = {other for other in imported if not (other in packages and name.startswith(f"{other}."))}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def long_ones(path):
    """The lines of code of a module's functions that are too long, and of the module if it is."""
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    # Lines of code are no more than lines, which are counted faster.
    functions = [f for f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION]
    found = {f.name: n for f in functions if (n := lines_of_function(lines, f)) > MAX_FUNCTION}
    whole = lines_of_code(lines)
    return {**found, **({path.name: whole} if whole > MAX_LINES else {})}


def test_a_folder_holds_few_modules():
    assert full_folders(TREE) == {}


def test_a_package_says_what_lives_there():
    assert silent_packages(TREE) == []


@pytest.mark.parametrize("package", LINES)
def test_imports_go_one_way(package):
    assert wrong_ways(TREE, package, LINES[package]) == []


def test_no_module_imports_in_a_circle():
    assert circle(TREE) == []


def test_files_and_functions_are_short():
    assert {name: found for name, path in TREE.paths.items() if (found := long_ones(path))} == {}


# The rules themselves, on a small tree ----------------------------------------------------------------------

DOC = f'"""{"What lives here, in words that a reader understands. " * 2}"""\n'
GOOD = {
    "__init__.py": DOC,
    "low/__init__.py": DOC,
    "low/a.py": "import math\n",
    "low/b.py": "from pkg.low.a import x\n",
    "high/__init__.py": DOC + "from pkg.high.c import y\n",
    "high/c.py": "from pkg.low import b\nimport pkg.low.a\nfrom pkg import __version__\n",
}
LINE = ("low", "high")


@pytest.fixture
def tree(tmp_path):
    """A function: a tree of these files, some of them changed."""

    def make(**changed):
        for name, text in {**GOOD, **{n.replace("__", "/", 1) + ".py": t for n, t in changed.items()}}.items():
            path = tmp_path / "pkg" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Tree(tmp_path / "pkg")

    return make


def test_a_tree_that_keeps_the_rules_passes(tree):
    good = tree(**{f"low__{i}": "" for i in range(MAX_MODULES - 2)})
    assert (full_folders(good), silent_packages(good), wrong_ways(good, "pkg", LINE), circle(good)) == ({}, [], [], [])


def test_a_folder_of_sixteen_modules_is_found(tree):
    assert full_folders(tree(**{f"low__{i}": "" for i in range(MAX_MODULES - 1)})) == {"low": MAX_MODULES + 1}


def test_a_package_without_a_word_is_found(tree):
    assert silent_packages(tree(low____init__='"""Low."""\n')) == ["low"]


@pytest.mark.parametrize(
    "text",
    [
        "from pkg.high import c",
        "import pkg.high.c",
        "def f():\n    from pkg.high.c import y",
        "from pkg.high.c import y",
    ],
)
def test_an_import_of_what_comes_later_is_found(tree, text):
    assert wrong_ways(tree(low__a=text), "pkg", LINE) == ["pkg.low.a imports pkg.high.c"]


def test_a_package_without_a_place_in_the_line_is_found(tree):
    assert wrong_ways(tree(), "pkg", ("low",)) == ["pkg.high has no place in the line"]


@pytest.mark.parametrize("text", ["from pkg.low import b", "def f():\n    import pkg.low.b"])
def test_a_circle_of_imports_is_found(tree, text):
    assert set(circle(tree(low__a=text))) == {"pkg.low.a", "pkg.low.b"}


def test_a_long_file_and_a_long_function_are_found(tmp_path):
    path = tmp_path / "a.py"

    def found(text):
        path.write_text(text)
        return long_ones(path)

    body = "    x = 1\n" * (MAX_FUNCTION - 1)
    assert found("x = 1\n" * MAX_LINES) == {}
    assert found("x = 1\n" * (MAX_LINES + 1)) == {"a.py": MAX_LINES + 1}
    assert found("def f():\n" + body) == {}
    assert found("async def f():\n    x = 1\n" + body) == {"f": MAX_FUNCTION + 1}
    # Comments and blank lines do not count; of docstrings those of functions, in the function alone.
    assert found("x = 1\n\n# Three.\n" * MAX_LINES) == {}
    assert found('"""One.\n\nTwo.\n"""\n' + "x = 1\n" * (MAX_LINES - 2)) == {"a.py": MAX_LINES + 1}
    assert found('def f():\n    """One.\n\n    Two.\n    """\n    # Three.\n\n' + body) == {}


# Other rules ------------------------------------------------------------------------------------------------


def test_the_core_imports_torch_and_numpy_alone():
    allowed = {"torch", "numpy", "triton", "zotune"}
    foreign = Counter()
    for name, path in TREE.paths.items():
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


def test_no_two_modules_of_tests_have_the_same_name():
    # pytest imports them by their names alone, and refuses the second one.
    names = Counter(p.name for p in Path(__file__).parent.rglob("test_*.py"))
    assert {name for name, count in names.items() if count > 1} == set()


def test_numba_is_gone():
    assert not any("numba" in path.read_text(encoding="utf-8") for path in MODULES)
