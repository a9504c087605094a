"""The current folder, which somebody else may have filled, is no place of modules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zotune.bench.run.processes import Process
from zotune.system.child_python import python, python_path

SOURCE = Path(__file__).parents[2] / "src"
# What Python imports for `python -m` itself, before the first line of the package.
PYTHONS_OWN = {"importlib", "warnings", "contextlib", "collections", "keyword", "operator", "reprlib", "functools"} | {
    "types",
    "encodings",
    "site",
    "runpy",
    "io",
    "os",
    "sys",
}


@pytest.fixture
def hostile(tmp_path):
    """A folder with a module of the name of each module that anything may import; each leaves a note and ends."""
    for name in {*sys.stdlib_module_names, "yaml", "pip", "torch", "numpy", "tyro", "zotune_plugins"} - PYTHONS_OWN:
        code = f"import _io\n_io.open({str(tmp_path / 'ran')!r}, 'a').write('{name}')\nraise SystemExit('{name} ran')\n"
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    return tmp_path


def test_the_command_imports_nothing_of_the_current_folder(hostile):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, "-m", "zotune", "train", "--help"]
    done = subprocess.run(command, cwd=hostile, env=environment, capture_output=True, text=True, check=False)
    assert not (hostile / "ran").exists(), done.stderr
    assert (done.returncode, "--learning-rate" in done.stdout) == (0, True), done.stderr


def test_a_child_imports_nothing_of_the_current_folder(hostile, monkeypatch):
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("PYTHONPATH", "")
    code = "import json, typing, zotune; print(zotune.__file__)"
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(python("-c", code), env=environment, capture_output=True, text=True, check=False)
    assert not (hostile / "ran").exists()
    assert Path(done.stdout.strip()).is_relative_to(SOURCE)
    assert "" not in python_path().split(os.pathsep)


def test_every_child_of_the_package_is_started_so():
    """No other module starts Python by itself; the restart of `zotune` repeats its own command line."""
    starts = [
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if "sys.executable" in path.read_text(encoding="utf-8")
    ]
    assert set(starts) == {"zotune/system/child_python.py", "zotune/system/malloc.py"}
    assert Process.command[:2] == (sys.executable, "-P")
