"""A few faults of each kind in children of this process; `make test-faults` injects hundreds, of files 100,000.

The faster form of the kills, in one process: runs cut anywhere (tests/llm/training/test_resume_run.py).
"""

import json
import os
import random
import signal
from pathlib import Path

import pytest

from faults import disks, fuzz, kills, pairs, tracing
from faults.commands import COMMANDS, Place
from zotune.cli import main as cli

RESULTS = Path(__file__).parents[1] / "benchmarks/results/faults.json"
FEWEST = {"kills": 600, "pairs": 100, "disks": 100, "accidents": 50, "fuzz": 100_000}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to run commands in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield Place(tmp_path_factory.mktemp("faults"))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kills, "undo"),
        (disks, "replay of an adapter"),
        (fuzz, "ledger 0 50"),
        (fuzz, "recipe 0 50"),
        (fuzz, "rows 0 50"),
        pytest.param(kills, "fo_adam, checkpoints", marks=pytest.mark.slow),
        pytest.param(pairs, "export, merge", marks=pytest.mark.slow),
        pytest.param(fuzz, "adapter 0 20", marks=pytest.mark.slow),
        pytest.param(fuzz, "gguf 0 20", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.partition(".")[2],
)
def test_a_fault_is_survived(place, kind, name):
    assert kind.trial(place, name, random.Random(1)) >= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("kind", [kills, disks], ids=["kills", "disks"])
def test_every_command_survives_a_fault(place, kind):
    for name in COMMANDS:
        kind.trial(place, name, random.Random(2))


# The harness sees what it is to see ---------------------------------------------------------------------------


def trial_of(place, monkeypatch, kind, name, seed=1, **broken):
    """A trial of a program with a fault of its own; what the harness says of it."""
    for target, replacement in broken.items():
        monkeypatch.setattr(cli, target, replacement)
    with pytest.raises(AssertionError) as failed:
        kind.trial(place, name, random.Random(seed))
    return str(failed.value)


@pytest.mark.skipif(not tracing.can_trace(), reason="needs ptrace and seccomp on x86-64")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_is_stopped_before_any_chosen_write(place, monkeypatch):
    def work(args):
        for name in "abc":
            Path(name).write_text(name)
        Path("a").rename("d")
        return 0

    monkeypatch.setattr(cli, "run", work)
    left = []
    for when in range(1, 8):
        place.empty()
        ended = place.traced([], tracing.kill_at(when, random.Random(0), torn=0))
        assert ended.was_killed
        left.append(len([path for path in place.here.iterdir() if path.suffix == "" and path.stat().st_size]))
    # Each file is made, then written; the last call gives one another name.
    assert left == [0, 0, 1, 1, 2, 2, 3]
    place.empty()
    ended = place.traced([])
    assert (ended.code, ended.writes) == (0, 7)


@pytest.mark.parametrize(
    ("work", "complaint"),
    [
        (lambda args: 3, "exit code 3"),
        (lambda args: 2, "exit code 2 without a message"),
        (lambda args: int("x"), "invalid literal"),
        (lambda args: len(bytearray(fuzz.MEMORY + (1 << 28))) and 0, "MemoryError"),
        (lambda args: os.kill(os.getpid(), signal.SIGKILL), "the process ended with -9"),
    ],
    ids=["code", "silence", "traceback", "memory", "crash"],
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_wrong_answer_to_a_file_is_seen(place, monkeypatch, work, complaint):
    assert complaint in trial_of(place, monkeypatch, fuzz, "table 0 1", run=work)


def test_the_recorded_faults_are_many_and_none_failed():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert [found[kind]["failed"] for kind in FEWEST] == [[]] * len(FEWEST)
    assert all(found[kind]["count"] >= fewest for kind, fewest in FEWEST.items())
    assert len(found["kills"]["tried"]) >= 15


def test_what_failed_is_tried_again_and_listed_as_mended_or_failed(place, monkeypatch):
    from faults import __main__ as command

    tried = []

    def trial(place, name, draw):
        tried.append((name, draw.random()))
        if name == "bad":
            raise AssertionError("still so")

    monkeypatch.setattr(fuzz, "trial", trial)
    failed = [{"number": i, "name": name, "error": "before"} for i, name in enumerate(["good", "bad"])]
    found = command.repeat("fuzz", {"seed": 3, "count": 9, "failed": failed}, place)
    assert found == {"seed": 3, "count": 9, "failed": [{**failed[1], "error": "still so"}], "mended": failed[:1]}
    assert tried == [(one["name"], random.Random(f"3 fuzz {one['number']}").random()) for one in failed]
