"""Under torchrun any process may be killed at any moment: the run goes on to the bits of the uninterrupted one."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import many_cases
import many_processes

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
_STEPS, _LIMIT = 60, 300


@pytest.fixture
def command(rows_file):
    def of(folder, *more, restarts=0, size=2):
        options = {
            **{
                "model": "random:llama-tiny",
                "train-file": rows_file,
                "num-dev": 3,
                "device": "cpu",
                "max-steps": _STEPS,
            },
            **{
                "per-device-train-batch-size": 2,
                "gradient-accumulation-steps": 2,
                "dtype": "float32",
                "method": "zo_adam",
            },
            **{"learning-rate": 1e-4, "output-dir": folder, "eval-steps": 20, "check-ranks": 10, "save-steps": 25},
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        start = ["--nproc-per-node", str(size), "--max-restarts", str(restarts), "--monitor-interval", "0.1"]
        start += ["--master-port", str(many_processes.free_port())]
        return [*TORCHRUN, *start, "-m", "zotune", "train", *words, *more]

    return of


def started(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers_of(process):
    """The process numbers of torchrun's workers."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found if Path(f"/proc/{pid}").exists()}
    return [pid for pid, text in commands.items() if b"zotune" in text]


def bits_of(folder):
    return {n: d for n, d in many_cases.written_by(folder).items() if n in ("ledger.zol", "model.safetensors")}


def test_a_run_goes_on_to_the_same_bits_after_kills_at_any_moment(command, tmp_path):
    whole = started(command(tmp_path / "whole"))
    said, _ = whole.communicate(timeout=_LIMIT)
    assert whole.returncode == 0, said
    draw = random.Random(0)
    for number in range(int(os.environ.get("ZOTUNE_KILLS", "20"))):
        folder = tmp_path / f"killed-{number}"
        run = started(command(folder, restarts=2))
        _kill_one(run, folder, draw)
        said, _ = run.communicate(timeout=_LIMIT)
        assert run.returncode == 0, (number, said)
        assert bits_of(folder) == bits_of(tmp_path / "whole"), (number, said)


def _kill_one(run, folder, draw):
    """Kill a worker after a random number of steps, or while it starts."""
    ledger, size = folder / "ledger.zol", draw.choice([0, 0, 1000, 2000, 3000, 4000])
    end = time.monotonic() + _LIMIT
    while time.monotonic() < end and run.poll() is None:
        workers = workers_of(run)
        if len(workers) == 2 and (not size or (ledger.exists() and ledger.stat().st_size >= size)):
            time.sleep(draw.random() * (8 if not size else 0.3))
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(workers), signal.SIGKILL)
            return
        time.sleep(0.05)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_to_any_worker_saves_and_ends_the_command(command, tmp_path, name, code):
    folder = tmp_path / "out"
    run = started(command(folder, "--max-steps", "2000"))
    end = time.monotonic() + _LIMIT
    while not (folder / "ledger.zol").exists() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(workers_of(run)[1], getattr(signal, name))
    said, _ = run.communicate(timeout=_LIMIT)
    assert f"exitcode  : {code}" in said, said
    assert (folder / "model.safetensors").is_file()


def test_a_wrong_command_is_told_once(command, tmp_path):
    run = started(command(tmp_path / "out", "--learning-rte", "1"))
    said, _ = run.communicate(timeout=_LIMIT)
    assert said.count("learning-rte") <= 2, said
    assert "exitcode  : 2" in said
