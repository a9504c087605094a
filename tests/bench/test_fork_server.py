"""Workers forked from a process that has imported the libraries, against workers that are started anew."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from zotune.bench.keys.code_hash import code_stamp
from zotune.bench.keys.content_key import PACKAGE
from zotune.bench.run.fork_server import ForkServer
from zotune.bench.run.jobs import Job, Outcome
from zotune.bench.run.processes import Process
from zotune.bench.run.worker import WORK, do
from zotune.bench.spec.schema import Limits
from zotune.errors import RunError, ZotuneError

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")

# A server whose jobs are lines of Python.
SERVER = """
import sys
from zotune.bench.run.fork_server import serve
def work(job):
    names = {"code": 0, **job}
    exec(job["options"]["run"], names)
    return names["code"]
sys.exit(serve(work))
"""
WROTE = "import json, os; json.dump({'pid': os.getpid(), 'parent': os.getppid()}, open(folder + '/found.json', 'w'))"


@pytest.fixture
def process():
    return Process(lambda: False, {}, (sys.executable, "-c", SERVER), forks=True)


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for_end(pid):
    until = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_jobs_are_processes_of_their_own_from_one_server(process, tmp_path):
    job = Job("train", {"run": WROTE})
    first, second = (process(job, tmp_path).found for _ in range(2))
    assert first["parent"] == second["parent"] != os.getpid()
    assert first["pid"] != second["pid"]


def test_what_a_job_prints_is_in_its_log_and_its_exit_code_is_its_own(process, tmp_path):
    failed = Job("train", {"run": "import sys; print('so much', file=sys.stderr); code = 1"})
    assert process(failed, tmp_path) == Outcome("failed", "so much")
    crashed = Job("train", {"run": "import os; os.abort()"})
    assert "-6" in process(crashed, tmp_path).message
    killed = Job("train", {"run": "import os; os.kill(os.getpid(), 9)"})
    assert process(killed, tmp_path).status == "out_of_memory"
    assert process(Job("train", {"run": WROTE}), tmp_path).status == "done"


def test_a_job_over_its_limit_is_ended_with_all_that_it_started_and_the_server_goes_on(process, tmp_path):
    child = tmp_path / "pid"
    code = "import subprocess, sys, time\n"
    code += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
    code += f"open({str(child)!r}, 'w').write(str(child.pid)); time.sleep(300)"
    before = process(Job("train", {"run": WROTE}), tmp_path).found
    assert process(Job("train", {"run": code}, Limits(minutes=0.1)), tmp_path).status == "timed_out"
    wait_for_end(int(child.read_text()))
    assert process(Job("train", {"run": WROTE}), tmp_path).found["parent"] == before["parent"]


def test_memory_is_limited_as_that_of_a_new_process(process, tmp_path):
    code = "import time\nx = bytearray(300 << 20)\nx[::4096] = b'1' * len(x[::4096])\ntime.sleep(300)"
    outcome = process(Job("train", {"run": code}, Limits(gib=0.2)), tmp_path)
    assert (outcome.status, "of 0.2" in outcome.message) == ("out_of_memory", True)


def test_a_server_that_was_killed_is_started_again(process, tmp_path):
    found = process(Job("train", {"run": WROTE}), tmp_path).found
    os.kill(found["parent"], signal.SIGKILL)
    wait_for_end(found["parent"])
    assert process(Job("train", {"run": WROTE}), tmp_path).found["parent"] != found["parent"]


def test_a_server_that_cannot_start_is_a_failed_job(tmp_path):
    outcome = Process(lambda: False, {}, (sys.executable, "-c", "raise SystemExit(5)"), forks=True)(
        Job("train", {}), tmp_path
    )
    assert (outcome.status, "exit code 5" in outcome.message) == ("failed", True)


def test_jobs_that_measure_their_process_have_a_new_one(tmp_path):
    line = "import json, os, sys; folder = json.loads(sys.stdin.readline())['folder']; " + WROTE
    process = Process(lambda: False, {}, (sys.executable, "-c", line), forks=True)
    assert process(Job("step", {}), tmp_path).found["parent"] == os.getpid()
    environment = {"OMP_NUM_THREADS": "1"}
    assert process(Job("train", {}, environment=environment), tmp_path).found["parent"] == os.getpid()


def test_server_and_worker_end_with_the_runner_however_it_ends(start, tmp_path):
    code = f"""
import os
from pathlib import Path
from bench_workers import SLEEPER
from zotune.bench.run.fork_server import ForkServer
server = ForkServer((*SLEEPER, "--fork"), os.environ)
folder = {str(tmp_path)!r}
worker = server.start({{"does": "train", "options": {{}}, "folder": folder}}, Path(folder, "log.txt"))
print(worker.pid, server._server.pid, flush=True)
worker.wait()
"""
    runner = start("-c", code)
    worker, server = map(int, runner.stdout.readline().split())
    until = time.monotonic() + 120
    while not (tmp_path / "began").exists():
        assert time.monotonic() < until and is_alive(worker), (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    runner.kill()
    runner.wait()
    wait_for_end(worker)
    wait_for_end(server)


RUN = dict(model="random:llama-tiny", task="sst2", method="zo_sgd", tuning="lora", max_steps=3, learning_rate=1e-3)
RUN |= dict(num_train=20, num_dev=10, num_eval=20, device="cpu", seed=3)
OUTCOMES = ("test", "dev", "dev_before", "right", "num_forwards")


def run_of_a_worker(folder, *, forks):
    folder.mkdir()
    # With a source given, no key is sent: both sides would read all code to compare theirs.
    process = Process(lambda: False, {"OMP_NUM_THREADS": "1"}, source=PACKAGE.parent, forks=forks)
    outcome = process(Job("train", RUN), folder)
    assert outcome.status == "done", outcome.message
    return json.dumps([outcome.found["run"][name] for name in OUTCOMES])


def test_a_run_of_a_forked_worker_has_the_bits_of_one_in_this_process(tmp_path):
    forked = run_of_a_worker(tmp_path / "forked", forks=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "here").mkdir()
    here = WORK["train"](dict(RUN), tmp_path / "here")
    torch.set_num_threads(threads)
    run = json.loads(json.dumps(here))["run"]
    assert forked == json.dumps([run[name] for name in OUTCOMES])


@pytest.mark.slow
def test_a_run_of_a_forked_worker_has_the_bits_of_one_started_anew(tmp_path):
    found = [run_of_a_worker(tmp_path / str(i), forks=forks) for i, forks in enumerate((False, True, True))]
    assert found[0] == found[1] == found[2]


def test_a_server_ends_with_its_owner(tmp_path):
    server = ForkServer((sys.executable, "-c", SERVER), os.environ)
    worker = server.start({"options": {"run": WROTE}, "folder": str(tmp_path)}, tmp_path / "log.txt")
    assert worker.wait(60) == 0
    pid = json.loads((tmp_path / "found.json").read_text())["parent"]
    del server
    assert not is_alive(pid)


def test_code_that_was_changed_since_the_server_began_is_refused(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("x = 1")
    before = code_stamp(package)
    (package / "a.py").write_text("x = 1")
    os.utime(package / "a.py", (1, 1))
    assert code_stamp(package) != before
    line = {"does": "evaluate", "options": {}, "folder": str(tmp_path)}
    with pytest.raises(RunError, match="start the runner again"):
        do(line, before)
    with pytest.raises(ZotuneError, match=r"^(?!.*start the runner again)"):
        do({**line, "options": {"nothing": 1}}, code_stamp(PACKAGE))
