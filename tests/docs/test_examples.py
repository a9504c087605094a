"""The examples run as a user runs them: from anywhere, alone, quickly; each asserts what it claims, and says it."""

import os
import re
import resource
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from zotune.methods.paper import METHODS

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


def test_the_shortest_example_runs_in_a_program_from_any_folder(tmp_path, monkeypatch, capsys):
    """In this process, which has loaded torch; each example in a process of its own is slow."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES[5]), run_name="__main__")
    said = capsys.readouterr()
    assert said.err == ""
    assert 3 <= len(said.out.splitlines()) <= 20
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """A function: an example to what it prints, run once, in an empty folder and a clean environment."""
    done = {}

    def run(path):
        if path not in done:
            kept = {name: os.environ[name] for name in ("PATH", "HOME", "XDG_CACHE_HOME", "CC") if name in os.environ}
            environment = {**kept, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            process = subprocess.run(
                [sys.executable, path],
                cwd=tmp_path_factory.mktemp(path.stem),
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            done[path] = process, seconds
        return done[path]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs_silently_but_for_its_results_and_within_half_a_minute_of_a_core(example, said):
    process, seconds = said(example)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert 3 <= len(process.stdout.splitlines()) <= 20
    assert seconds < 30


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_can_be_read_at_one_sitting_and_asserts_what_it_claims(example):
    lines = example.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert any(line.strip().startswith("assert ") for line in lines)


def test_there_are_six():
    assert [int(p.name[:2]) for p in EXAMPLES] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_the_function_is_minimised_at_its_minimum(said):
    last = [line for line in said(EXAMPLES[0])[0].stdout.splitlines() if line.startswith("step")][-1]
    x, y, value = map(float, re.search(r"f\((\S+), (\S+)\) = (\S+)", last).groups())
    assert x == pytest.approx(1, abs=0.02)
    assert y == pytest.approx(1, abs=0.04)
    assert (1 - x) ** 2 + 100 * (y - x**2) ** 2 == pytest.approx(value, abs=2e-5)


@pytest.mark.slow
def test_every_method_is_compared_at_the_same_number_of_passes(said):
    rows = {line.split()[0]: line.split() for line in said(EXAMPLES[1])[0].stdout.splitlines() if line}
    assert set(METHODS) <= set(rows)
    # One step takes at most 17 passes, those of randopt, so no method overshoots by more.
    assert {name for name in METHODS if not 800 <= int(rows[name][2]) < 817} == set()


@pytest.mark.slow
def test_measured_noise_is_that_of_theory_and_falls_with_queries_and_blocks(said):
    lines = said(EXAMPLES[3])[0].stdout.splitlines()
    found = {}
    for line in lines:
        if match := re.match(r"(\w[\w ]+?) +(\d+) +(\S+) ± +(\S+) +(\S+)$", line):
            found[match[1]] = [float(match[i]) for i in (2, 3, 4, 5)]
    d = 6 * 8 + 8 * 8 + 8
    assert found["one direction"][3] == d - 1
    assert found["random mask"][3] == d
    assert found["three directions"][0] == found["three blocks"][0] == 3 * found["one direction"][0]
    assert all(abs(mean - theory) < 4 * error for _, mean, error, theory in found.values())
    assert len(found) == 5


@pytest.mark.slow
def test_memory_falls_with_each_layer_that_is_left_to_forward_passes(said):
    lines = said(EXAMPLES[5])[0].stdout.splitlines()[1:]
    kept = [int(line.split()[1]) for line in lines]
    assert len(kept) == 4
    # Layers are equal, so each leaves out the same.
    steps = [a - b for a, b in pairwise(kept)]
    assert max(steps) - min(steps) < 0.02 * kept[0]
