"""The content key changes with what code computes, not with where it stands or what it is called."""

import itertools
import shutil
from pathlib import Path

import pytest

from zotune.bench.keys import code_hash as code_hash_module
from zotune.bench.keys.code_hash import code_hash
from zotune.bench.keys.content_key import ENTRIES, PACKAGE, code_of, key_of

PLAIN = {
    "__init__.py": "",
    "entry.py": """
import math
from typing import Any

from pkg import show
from pkg.maths import scaled, shift
from pkg.tools import Box

SIZE = 3


def entry(x: int, *, by: float = 0.5) -> Any:
    "Says what it does."
    # A comment.
    show.say(f"about to do {x}")
    if x < 0:
        raise ValueError(f"x must not be negative, got {x}")
    return [Box(math.sqrt(scaled(i, by))).get() + shift(i) for i in range(SIZE)]
""",
    "maths.py": """
FACTOR = 2.0


def scaled(x, by):
    return FACTOR * x * by


def shift(x):
    return x + 1


def unused(x):
    return x - 1
""",
    "tools.py": """
from dataclasses import dataclass


@dataclass
class Box:
    value: float
    twice: bool = False

    def get(self):
        from pkg.maths import scaled

        return scaled(self.value, 2 if self.twice else 1)
""",
    "show.py": """
COUNTS_FOR_RESULTS = "never"


def say(text):
    print(text)
""",
}
SHIFT = "def shift(x):\n    return x + 1\n"
numbers = itertools.count()


def hash_of(tmp_path, files, **options):
    """The hash of `entry` in a package of these files."""
    folder = tmp_path / str(next(numbers)) / "pkg"
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return code_hash(folder, ("entry",), **options)


def changed(name, *pairs, files=PLAIN):
    """The files with one of them edited."""
    text = files[name]
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return {**files, name: text}


def without(files, *names):
    return {name: text for name, text in files.items() if name not in names}


_BOX = PLAIN["tools.py"].replace("pkg.maths", "pkg.deep.down.numbers")

SAME = {
    "a comment, a docstring, the layout": changed(
        "entry.py", ("# A comment.", "# Another,\n    # longer one."), ("Says what", "Tells what"), ("x < 0", "(x < 0)")
    ),
    "an annotation of a function": changed("entry.py", ("x: int", "x: 'Any'"), ("-> Any", "-> list[float]")),
    "the text of an error and of a message": changed("entry.py", ("x must not be", "x is"), ("about to do", "doing")),
    "a message more": changed("entry.py", ("    return [", "    show.say('done')\n    return [")),
    "what only shows": changed("show.py", ("print(text)", "print(text, text)")),
    "code that nothing runs": changed("maths.py", ("x - 1", "x - 2")),
    "imports in another way": changed(
        "entry.py",
        ("import math\n", "from math import sqrt as root\n"),
        ("math.sqrt", "root"),
        ("from pkg.maths import scaled, shift", "from pkg import maths as m"),
        ("scaled(i", "m.scaled(i"),
        ("shift(i", "m.shift(i"),
    ),
    "a function in another module": {
        **changed("entry.py", ("scaled, shift\n", "scaled\nfrom .other import shift\n")),
        "maths.py": PLAIN["maths.py"].replace(SHIFT, ""),
        "other.py": SHIFT,
    },
    "a module renamed and deeper": {
        **without(PLAIN, "maths.py"),
        "deep/down/numbers.py": PLAIN["maths.py"],
        "entry.py": PLAIN["entry.py"].replace("pkg.maths", "pkg.deep.down.numbers"),
        "tools.py": _BOX,
    },
    "two modules merged": {
        **without(PLAIN, "tools.py"),
        "maths.py": PLAIN["tools.py"].replace("        from pkg.maths import scaled\n\n", "") + PLAIN["maths.py"],
        "entry.py": PLAIN["entry.py"].replace("pkg.tools", "pkg.maths"),
    },
    "names through a package": {
        **without(PLAIN, "maths.py"),
        "maths/__init__.py": "from pkg.maths.maths import scaled as scaled\nfrom .maths import shift as shift\n",
        "maths/maths.py": PLAIN["maths.py"],
    },
    "a function of another name": {
        name: text.replace("scaled", "stretched").replace("FACTOR", "TIMES").replace("Box", "Crate")
        for name, text in PLAIN.items()
    },
    "the same function twice": changed("entry.py", ("scaled, shift", "scaled"), ("SIZE = 3", f"{SHIFT}\n\nSIZE = 3")),
}

OTHER = {
    "an operator": changed("maths.py", ("x + 1", "x * 1")),
    "a constant of a function": changed("maths.py", ("x + 1", "x + 2")),
    "a constant of a module": changed("maths.py", ("2.0", "3.0")),
    "the type of a constant": changed("maths.py", ("x + 1", "x + 1.0")),
    "a default": changed("entry.py", ("= 0.5", "= 0.25")),
    "a default of an argument by place": changed("maths.py", ("scaled(x, by)", "scaled(x, by=1)")),
    "a field's default": changed("tools.py", ("= False", "= True")),
    "a field's type": changed("tools.py", ("value: float", "value: int")),
    "a decorator": changed("tools.py", ("@dataclass", "@dataclass(frozen=True)")),
    "the order of arguments": changed("maths.py", ("scaled(x, by)", "scaled(by, x)"), ("x * by", "by * x")),
    "a method": changed("tools.py", ("2 if", "3 if")),
    "a function of a library": changed("entry.py", ("math.sqrt", "math.exp")),
    "which of two functions is called": changed("entry.py", ("shift(i)", "unused(i)"), (", shift", ", unused")),
    "which function a name stands for": changed("entry.py", ("scaled, shift", "scaled, unused as shift")),
    "two functions exchanged": changed("maths.py", ("def shift", "def other"), ("def unused", "def shift")),
    "what a module does as it is imported": changed("maths.py", ("FACTOR = 2.0", "FACTOR = 2.0\nscaled.more = 1")),
    "a branch of a module": changed("maths.py", ("FACTOR = 2.0", "if 1:\n    FACTOR = 2.0")),
    "a condition": changed("entry.py", ("x < 0", "x <= 0")),
}


@pytest.mark.parametrize("name", SAME)
def test_the_hash_of_code_stays_with(name, tmp_path):
    assert hash_of(tmp_path, SAME[name]) == hash_of(tmp_path, PLAIN)


@pytest.mark.parametrize("name", OTHER)
def test_the_hash_of_code_changes_with(name, tmp_path):
    assert hash_of(tmp_path, OTHER[name]) != hash_of(tmp_path, PLAIN)


def test_which_of_two_functions_another_one_calls_counts_where_both_are_called(tmp_path):
    calls = (
        "def entry(x):\n    return f(x) - g(x)\n\n\ndef f(x):\n    return a(x)\n\n\ndef g(x):\n    return 2 * b(x)\n"
    )
    files = {"entry.py": f"{calls}\n\ndef a(x):\n    return x\n\n\ndef b(x):\n    return -x\n"}
    exchanged = changed(
        "entry.py", ("return a(", "return c("), ("* b(", "* a("), ("return c(", "return b("), files=files
    )
    assert hash_of(tmp_path, exchanged) != hash_of(tmp_path, files)


def test_a_module_that_is_passed_around_counts_with_its_public_names(tmp_path):
    calls = "from pkg import a\n\n\ndef entry(x):\n    return _of(x).f(x)\n\n\ndef _of(x):\n    return a\n"
    one = {
        "entry.py": calls,
        "a.py": "def f(x):\n    return x\n\n\ndef g(x):\n    return _h(x)\n\n\ndef _h(x):\n    return 2\n",
    }
    plain = hash_of(tmp_path, one)
    assert hash_of(tmp_path, changed("a.py", ("_h", "_helper"), files=one)) == plain
    assert hash_of(tmp_path, changed("a.py", ("return 2", "return 3"), files=one)) != plain
    exchanged = changed("a.py", ("def f(", "def t("), ("def g(", "def f("), ("def t(", "def g("), files=one)
    assert hash_of(tmp_path, exchanged) != plain


def test_a_process_of_the_package_counts_with_what_it_runs(tmp_path):
    started = 'import subprocess\n\n\ndef entry(x):\n    subprocess.run(["python", "-m", "pkg.work"])\n'
    work = (
        "def take():\n    return 1\n\n\ndef other():\n    return 1\n\n\nif __name__ == '__main__':\n    print(take())\n"
    )
    one = {"entry.py": started, "work.py": work}
    plain = hash_of(tmp_path, one)
    moved = {"entry.py": started.replace("pkg.work", "pkg.run.work"), "run/work.py": work}
    assert hash_of(tmp_path, moved) == plain
    for old, new in (("take():\n    return 1", "take():\n    return 2"), ("print(take())", "print(2 * take())")):
        assert hash_of(tmp_path, changed("work.py", (old, new), files=one)) != plain
    assert (
        hash_of(tmp_path, changed("work.py", ("other():\n    return 1", "other():\n    return 2"), files=one)) == plain
    )


def test_a_name_of_a_function_hides_the_modules(tmp_path):
    hidden = (
        "from pkg.maths import shift\n\n\ndef entry(x):\n    return [shift for shift in x], (lambda shift: shift)(x)\n"
    )
    files = {"entry.py": hidden, "maths.py": PLAIN["maths.py"]}
    assert hash_of(tmp_path, files) == hash_of(tmp_path, changed("maths.py", ("x + 1", "x + 2"), files=files))
    called = changed("entry.py", ("return [", "return shift(x), ["), files=files)
    assert hash_of(tmp_path, called) != hash_of(tmp_path, changed("maths.py", ("x + 1", "x + 2"), files=called))


def test_what_only_a_gpu_runs_counts_there_alone(tmp_path):
    entry = "def entry(x):\n    from pkg.gpu import f\n\n    return f(x)\n"
    files = {"entry.py": entry, "gpu.py": 'COUNTS_FOR_RESULTS = "on cuda"\n\n\ndef f(x):\n    return 1\n'}
    other = changed("gpu.py", ("return 1", "return 2"), files=files)
    assert hash_of(tmp_path, files, on_cpu=True) == hash_of(tmp_path, other, on_cpu=True)
    assert hash_of(tmp_path, files) != hash_of(tmp_path, other)


def test_c_counts_without_its_comments(tmp_path):
    files = {**PLAIN, "a.c": 'int f() { return 1; /* one */ }\nchar *s = "// text";\n'}
    plain = hash_of(tmp_path, files)
    assert hash_of(tmp_path, changed("a.c", ("/* one */", "/* two */"), files=files)) == plain
    assert hash_of(tmp_path, {**without(files, "a.c"), "deep/b.c": files["a.c"]}) == plain
    assert hash_of(tmp_path, changed("a.c", ("return 1", "return 2"), files=files)) != plain
    assert hash_of(tmp_path, changed("a.c", ("// text", "// other"), files=files)) != plain


def test_an_entry_that_is_gone_or_defined_twice_is_an_error(tmp_path):
    with pytest.raises(LookupError, match="no module defines it"):
        hash_of(tmp_path, {"a.py": "x = 1\n"})
    with pytest.raises(LookupError, match=r"pkg\.a, pkg\.b defines it"):
        hash_of(tmp_path, {"a.py": "def entry(): ...\n", "b.py": "def entry(): ...\n"})


# The package itself ----------------------------------------------------------------------------------------


def definitions(kind, *, on_cpu=True):
    """The names of all definitions that a kind of cell passes through."""
    reached = code_hash_module._reached(code_hash_module._package(PACKAGE), ENTRIES[kind], on_cpu)
    return {getattr(one.node, "name", "") for one in reached}, {one.module for one in reached}


def test_a_cell_passes_through_what_it_computes_with_and_not_through_what_shows_it():
    accuracy, modules = definitions("accuracy")
    assert {"train", "load_rows", "ZerothOrder", "zo_adam", "ParameterSet", "Direction"} <= accuracy
    assert not {"write_run_page", "report", "Display", "say", "PlanConfig", "key_of"} & accuracy
    assert {module.counts for module in modules} == {"always"}
    assert "on cuda" in {module.counts for module in definitions("accuracy", on_cpu=False)[1]}
    step, _ = definitions("memory")
    assert {"measure", "prepare_step", "memory_by_formula", "Recorder"} <= step - accuracy
    assert {code_of({"kind": "memory"}), code_of({"kind": "theory"})} == {code_of({"kind": "time"})}
    assert len({code_of({"kind": kind}) for kind in ("accuracy", "quality", "memory")}) == 3


def test_every_name_of_the_package_that_code_refers_to_is_found():
    package = code_hash_module._package(PACKAGE)  # whose modules others have read, too
    for name in package.sources:
        module = package.module(name)
        for bound, path in module.imports.items():
            if path.startswith(f"{package.name}"):
                found = package.resolve(path)
                assert found.definitions or found.module, (name, bound, path)


@pytest.mark.slow
def test_a_copy_of_the_package_with_a_module_in_another_place_has_its_keys(tmp_path):
    copy = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.jsonl*"))
    plain = code_hash(PACKAGE, ENTRIES["quality"], on_cpu=True)
    moved = Path(copy / "moved")
    moved.mkdir()
    (copy / "apply" / "transforms.py").rename(moved / "maps.py")
    for path in copy.rglob("*.py"):
        path.write_text(path.read_text().replace("zotune.apply.transforms", "zotune.moved.maps"))
    assert code_hash.__wrapped__(copy, ENTRIES["quality"], on_cpu=True) == plain
    (moved / "maps.py").write_text((moved / "maps.py").read_text().replace("1 - beta1", "1 + beta1"))
    code_hash_module._package.cache_clear()
    assert code_hash.__wrapped__(copy, ENTRIES["quality"], on_cpu=True) != plain


def test_data_and_libraries_are_part_of_the_key(monkeypatch):
    from zotune.bench.keys import content_key as keys

    plain = key_of({"task": "copa"}, "code")
    assert plain != key_of({"task": "copa"}, "other")
    monkeypatch.setattr(keys, "_versions", lambda: {"torch": "0"})
    assert key_of({"task": "copa"}, "code") != plain
    monkeypatch.undo()
    monkeypatch.setattr(keys, "_data_hash", lambda task: "other rows")
    assert key_of({"task": "copa"}, "code") != plain


def test_the_rows_of_a_task_are_found_below_any_folder_of_data(tmp_path, monkeypatch):
    from zotune.bench.keys import content_key as keys

    monkeypatch.setattr(keys, "PACKAGE", tmp_path / "src" / "pkg")
    hashes = set()
    for place, text in (("data/a", "1"), ("src/pkg/x/data/a", "2"), ("src/pkg/data/b", "3")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "train.jsonl").write_text(text)
        hashes.add(keys._data_hash.__wrapped__("a"))
    assert len(hashes) == 2
