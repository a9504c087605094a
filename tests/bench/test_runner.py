"""The runner loses nothing and mixes nothing: interrupted anywhere it goes on to the same results, stale ones are told
apart, limits hold, and two runners share the work.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench_cells import contents, here, made_up, run_cells, small_cells
from zotune.bench.results.records import CellResult, mean_and_error, read_result, repeatable, result_path
from zotune.bench.run import runner as runner_module
from zotune.bench.run.jobs import JOBS, Job, Outcome, Store, locked
from zotune.bench.run.processes import Process, resident_bytes
from zotune.bench.run.runner import key_of_cell, state_of
from zotune.bench.spec.resolve import cells, find
from zotune.bench.spec.schema import Limits
from zotune.bench.spec.selection import chosen_cells

# Resuming --------------------------------------------------------------------------------------------------


class Interrupted:
    """An executor that is interrupted in its n-th job, and counts."""

    def __init__(self, after=None):
        self.after, self.jobs = after, []

    def __call__(self, job, folder):
        if len(self.jobs) == self.after:
            raise KeyboardInterrupt
        self.jobs.append(job.key)
        return made_up(job, folder)


def test_a_run_interrupted_in_any_job_goes_on_to_the_same_results_and_repeats_no_job(tmp_path):
    specs = small_cells()
    whole = Interrupted()
    run_cells(specs, tmp_path / "whole", whole)
    reference = repeatable(contents(tmp_path / "whole"))
    assert len(reference) == 2
    assert len(whole.jobs) == 9  # of each method two trials and two seeds, and a zero-shot that both share
    for after in range(len(whole.jobs)):
        results = tmp_path / str(after)
        first, second = Interrupted(after), Interrupted()
        run_cells(specs, results, first)
        run_cells(specs, results, second)
        assert repeatable(contents(results)) == reference
        assert first.jobs + second.jobs == whole.jobs


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(tmp_path):
    specs = small_cells()

    def failing(job, folder):
        fails = job.options.get("method") == "zo_adam" and job.options.get("seed") == 1
        return Outcome("failed", "no luck") if fails else made_up(job)

    assert run_cells(specs, tmp_path, failing) == {specs[0].path: "done", specs[1].path: "failed"}
    found = read_result(result_path(tmp_path, "smoke", "small", specs[1].name))
    assert (found.status, found.message, [run.seed for run in found.runs]) == ("failed", "seed 1: no luck", [0])
    again = Interrupted()
    assert set(run_cells(specs, tmp_path, again).values()) == {"done"}
    assert len(again.jobs) == 1
    nothing = Interrupted()
    run_cells(specs, tmp_path, nothing)
    assert nothing.jobs == []


@pytest.mark.parametrize("content", ["", "[]", "{}", "3", '{"run"', "\0", "[" * 9999], ids=ascii)
def test_a_damaged_job_is_run_again(tmp_path, content):
    specs = small_cells()
    first, again = Interrupted(), Interrupted()
    run_cells(specs, tmp_path, first)
    reference = repeatable(contents(tmp_path))
    (path,) = (tmp_path / "smoke" / JOBS).glob(f"{first.jobs[-1]}.json")
    path.write_text(content)
    result_path(tmp_path, "smoke", "small", specs[-1].name).unlink()
    run_cells(specs, tmp_path, again)
    assert again.jobs == first.jobs[-1:]
    assert repeatable(contents(tmp_path)) == reference


def test_a_trial_that_fails_loses_the_search_and_does_not_end_the_cell(tmp_path):
    (spec, _) = small_cells()

    def failing(job, folder):
        diverges = job.options.get("learning_rate") == 1e-2 and job.options["max_steps"] == 1
        return Outcome("timed_out", "slow") if diverges else made_up(job)

    run_cells([spec], tmp_path, failing)
    found = read_result(result_path(tmp_path, "smoke", "small", spec.name))
    assert [(t.learning_rate, t.status) for t in found.search] == [(1e-3, "done"), (1e-2, "timed_out")]
    assert (found.status, found.chosen.learning_rate) == ("done", 1e-3)


def test_the_search_takes_the_lowest_held_out_loss_and_sees_no_evaluation_row(tmp_path):
    seen = []

    def executor(job, folder):
        seen.append(job)
        return made_up(job)

    specs = small_cells(scale={"smoke": {"search": {"learning_rate": [1e-4, 1e-3, 1e-2], "mu": [1e-3, 1e-2]}}})
    run_cells(specs, tmp_path, executor)
    for spec in specs:
        found = read_result(result_path(tmp_path, "smoke", "small", spec.name))
        assert len(found.search) == 6
        best = min(found.search, key=lambda t: t.dev_loss)
        assert (found.chosen.learning_rate, found.chosen.mu) == (best.learning_rate, best.mu)
    trials = [j for j in seen if j.does == "train" and "load_best_model_at_end" not in j.options]
    assert len(trials) == 12
    assert {j.options["num_eval"] for j in trials} == {0}
    full = [j for j in seen if j.does == "train" and j not in trials]
    assert all(j.options["eval_steps"] <= j.options["max_steps"] for j in full)


# Keys ------------------------------------------------------------------------------------------------------


def test_a_result_of_other_code_or_config_is_stale_and_is_found_again_unless_it_is_kept(tmp_path, monkeypatch):
    specs = small_cells()
    run_cells(specs, tmp_path)
    before = contents(tmp_path)
    assert {state_of(tmp_path, spec) for spec in specs} == {"done"}
    changed = small_cells(options={"task": "copa", "model": "random:opt-tiny", "tuning": "prefix"})
    assert {state_of(tmp_path, spec) for spec in changed} == {"stale"}
    monkeypatch.setattr("zotune.bench.keys.content_key.code_of", lambda config: "other code")
    assert {state_of(tmp_path, spec) for spec in specs} == {"stale"}
    assert set(run_cells(specs, tmp_path, keeps_stale=True).values()) == {"stale"}
    assert contents(tmp_path) == before
    again = Interrupted()
    run_cells(specs, tmp_path, again)
    assert len(again.jobs) == 9  # not one job of the old code is taken for the new
    assert {state_of(tmp_path, spec) for spec in specs} == {"done"}


def test_the_grid_is_part_of_what_is_found_only_where_there_is_a_search():
    for experiment, is_searched in (("table2", True), ("table4", False), ("table5", False)):
        spec = next(iter(cells(*find(experiment), "cpu")))
        wider = spec.model_copy(update={"search": spec.search.model_copy(update={"learning_rate": (1.0, 2.0)})})
        assert (key_of_cell(spec) != key_of_cell(wider)) == is_searched


def test_a_result_is_read_back_as_it_was_and_two_runs_differ_in_times_alone(tmp_path):
    specs = small_cells()

    def slower(job, folder):
        found = made_up(job).found
        if "run" in found:
            found["run"]["seconds"] += 1
            found["run"]["peak_memory"] += 1
        return Outcome("done", found=found)

    for name, executor in (("a", made_up), ("b", slower)):
        run_cells(specs, tmp_path / name, executor)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a != b
    assert repeatable(a) == repeatable(b)
    for path, plain in a.items():
        assert CellResult.model_validate(plain) == read_result(tmp_path / "a" / path)


def test_mean_and_standard_error_are_those_of_the_sample():
    mean, error = mean_and_error([0.5, 0.7, 0.9])
    assert (round(mean, 12), round(error, 12)) == (0.7, round(0.2 / 3**0.5, 12))


# Budgets ---------------------------------------------------------------------------------------------------


def test_a_budget_of_forwards_pays_steps_by_what_each_method_takes(tmp_path):
    methods = ["zo_sgd", "zo_sgd_cons", "forward_grad", "fo_sgd"]
    specs = small_cells(axes={"method": methods}, budget={"forward_equivalents": 60})
    run_cells(specs, tmp_path)
    found = {s.coordinates["method"]: read_result(result_path(tmp_path, "smoke", "small", s.name)) for s in specs}
    assert {m: found[m].chosen.max_steps for m in methods} == {
        "zo_sgd": 30,
        "zo_sgd_cons": 12,
        "forward_grad": 30,
        "fo_sgd": 20,
    }


def test_a_budget_of_seconds_goes_by_the_trials_speed(tmp_path):
    (spec, _) = small_cells(budget={"seconds": 5.0}, options={"task": "copa", "max_steps": 10})
    run_cells([spec], tmp_path)
    found = read_result(result_path(tmp_path, "smoke", "small", spec.name))
    assert found.chosen.max_steps == 40  # at 0.1 seconds a step after a second, as made up


def test_a_budget_of_memory_takes_the_first_batch_that_fits_and_keeps_the_examples_a_step(tmp_path):
    def taking(job, folder):
        found = made_up(job).found
        if "run" in found:
            size = job.options["per_device_train_batch_size"] * 100 * 2**20
            # What the process held before the model is no part of it.
            found["run"] |= {"peak_memory": 2**40, "measured": {"step_bytes": size, "loading_bytes": 50 * 2**20}}
        return Outcome("done", found=found)

    budget = {"mib": 450, "batch_sizes": [16, 8, 4, 2]}
    spec, _ = small_cells(budget=budget, options={"task": "copa", "per_device_train_batch_size": 16})
    run_cells([spec], tmp_path, taking)
    found = read_result(result_path(tmp_path, "smoke", "small", spec.name))
    assert (found.status, found.chosen.per_device_train_batch_size) == ("done", 4)
    too_small = small_cells(budget={"mib": 50, "batch_sizes": [2, 1]})[1]
    assert run_cells([too_small], tmp_path, taking) == {too_small.path: "out_of_memory"}


# Sharing ---------------------------------------------------------------------------------------------------


def test_two_runners_over_one_folder_do_each_job_once(tmp_path):
    specs = small_cells(axes={"method": ["zo_sgd", "zo_adam", "zo_sgd_mmt", "fo_adam"]})
    jobs, lock = [], threading.Lock()

    def executor(job, folder):
        with lock:
            jobs.append(job.key)
        time.sleep(0.02)
        return made_up(job)

    runs = [threading.Thread(target=run_cells, args=(specs, tmp_path, executor, executor)) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert len(jobs) == len(set(jobs)) == 17
    assert {state_of(tmp_path, spec) for spec in specs} == {"done"}


def test_a_lock_ends_with_its_process(tmp_path, start):
    path = tmp_path / "lock"
    code = "import sys, time; from pathlib import Path; from zotune.bench.run.jobs import locked\n"
    code += "with locked(Path(sys.argv[1])) as mine:\n print(mine(), flush=True); time.sleep(60)"
    other = start("-c", code, path)
    assert other.stdout.readline() == "True\n"
    with locked(path) as is_mine:
        assert not is_mine()
        other.kill()
        other.wait()
        assert is_mine()


# Processes -------------------------------------------------------------------------------------------------


def process(code, stopped=lambda: False):
    """A worker that is some lines of Python."""
    return Process(stopped, {}, (sys.executable, "-c", code))


def test_a_job_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    code = "import subprocess, sys, time\n"
    code += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    code += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    job = Job("train", {}, Limits(minutes=0.1))
    began = time.monotonic()
    outcome = process(code)(job, tmp_path)
    assert (outcome.status, time.monotonic() - began < 40) == ("timed_out", True)
    pid, until = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while is_alive(pid):  # the system takes its time to end what was killed
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_job_that_takes_too_much_memory_is_ended(tmp_path):
    code = "import time\nx = bytearray(300 << 20)\nx[::4096] = b'1' * len(x[::4096])\ntime.sleep(60)"
    outcome = process(code)(Job("train", {}, Limits(gib=0.2)), tmp_path)
    assert outcome.status == "out_of_memory"
    assert "of 0.2" in outcome.message


def test_a_process_that_fails_says_why(tmp_path):
    assert process("import sys; print('so much', file=sys.stderr); sys.exit(1)")(Job("train", {}), tmp_path) == Outcome(
        "failed", "so much"
    )
    crashed = process("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")(Job("train", {}), tmp_path)
    assert (crashed.status, "-11" in crashed.message) == ("failed", True)
    killed = process("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")(Job("train", {}), tmp_path)
    assert killed.status == "out_of_memory"


def test_resident_memory_is_that_of_the_session(start):
    code = "import os, time\nos.setsid()\nx = b'1' * (100 << 20)\nprint(flush=True); time.sleep(60)"
    other = start("-c", code)
    other.stdout.readline()
    assert 100 << 20 < resident_bytes(other.pid) < 200 << 20


def test_a_worker_refuses_a_job_of_other_code(tmp_path):
    job = Job("train", {"task": "copa"})
    line = json.dumps({"does": "train", "options": job.options, "key": "0" * 16, "folder": str(tmp_path)})
    source = str(Path(runner_module.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "zotune.bench.run.worker"],
        input=line + "\n",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
        start_new_session=True,
        check=False,
    )
    # Its input ends with the line, so that it may also leave before it says why.
    assert done.returncode != 0
    assert not (tmp_path / "found.json").exists()


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def sessions_of_workers(folder):
    """Processes that have a file below a folder open: workers write their log there."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.append(int(link.parts[2]))
    return found


@pytest.mark.slow
def test_killed_outright_the_runner_leaves_no_process_and_the_next_one_gives_the_same_results(tmp_path, start):
    only = ("--scale", "smoke", "--only", "table8/0.5*")
    first = start("-m", "zotune", "bench", "run", "table8", *only, "--results", tmp_path / "killed")
    jobs = tmp_path / "killed" / "smoke" / JOBS
    until = time.monotonic() + 120
    while not list(jobs.glob("*.json")) or not sessions_of_workers(jobs):
        assert time.monotonic() < until and first.poll() is None
        time.sleep(0.05)
    # The zero-shot is done, and the run is going on.
    first.send_signal(signal.SIGKILL)
    first.wait()
    while sessions_of_workers(jobs):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not contents(tmp_path / "killed")
    second = start("-m", "zotune", "bench", "run", "table8", *only, "--results", tmp_path / "killed")
    said, log = second.communicate()
    assert (second.returncode, said) == (0, f"1 of 1 cells done in {tmp_path / 'killed'}\n"), log
    assert "table8/0.5--sst2--full--zo_sgd: done" in log
    (specs,) = chosen_cells(["table8"], "smoke", ["table8/0.5*"]).values()
    run_cells(specs, tmp_path / "here", here)
    both = [contents(tmp_path / name) for name in ("killed", "here")]
    for found in both:
        # Threads are those of the process, which here is the tests'.
        for cell in found.values():
            assert cell.pop("environment")["torch"]
    assert repeatable(both[0]) == repeatable(both[1])
    assert both[0] != both[1]


def test_a_signal_ends_the_runner_and_its_workers_and_says_so(tmp_path, start):
    code = """
import sys
from functools import partial
from bench_workers import SLEEPER
from zotune.bench.run import processes
processes.Process = partial(processes.Process, command=SLEEPER)
from zotune.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    run = start("-c", code, "bench", "run", "table8", "--scale", "smoke", "--results", tmp_path)
    jobs = tmp_path / "smoke" / JOBS
    until = time.monotonic() + 120
    while not list(jobs.glob("*/began")):
        assert time.monotonic() < until and run.poll() is None
        time.sleep(0.05)
    assert sessions_of_workers(jobs)
    run.send_signal(signal.SIGTERM)
    _, log = run.communicate()
    assert (run.returncode, "stopping" in log) == (143, True)
    assert not sessions_of_workers(jobs)
    assert not contents(tmp_path)


def test_a_store_waits_for_another_ones_job_and_takes_what_it_found(tmp_path):
    job, order = Job("evaluate", {}), []

    def slow(job, folder):
        order.append("began")
        time.sleep(0.3)
        order.append("ended")
        return made_up(job)

    other = threading.Thread(target=Store(tmp_path, slow), args=(job,))
    other.start()
    while not order:
        time.sleep(0.01)
    assert Store(tmp_path, slow)(job).status == "done"
    other.join()
    assert order == ["began", "ended"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_jobs_share_out_the_processors():
    from zotune.cli.bench import _parser, _slots

    slots = _slots(_parser().parse_args(["run", "--jobs", "2"]), threading.Event())
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [slot.environment["OMP_NUM_THREADS"] for slot in slots] == [str(threads)] * 2


def test_what_ran_out_of_time_goes_on_from_what_it_had_written_and_what_failed_begins_anew(tmp_path):
    job, seen = Job("evaluate", {}), []

    def executor(status):
        def execute(job, folder):
            seen.append(sorted(p.name for p in folder.iterdir()))
            (folder / "written").touch()
            return Outcome(status) if status != "done" else made_up(job)

        return execute

    for status in ("timed_out", "failed", "out_of_memory", "done"):
        Store(tmp_path, executor(status))(job)
    assert seen == [[], ["written"], [], []]
    assert [p for p in (tmp_path / JOBS).iterdir() if p.is_dir()] == []


def test_a_job_whose_runner_was_killed_when_it_was_done_leaves_no_files(tmp_path):
    job = Job("evaluate", {})
    store = Store(tmp_path, lambda job, folder: made_up(job))
    store(job)
    left = tmp_path / JOBS / job.key
    left.mkdir()
    (left / "ledger.zol").touch()
    assert store(job).status == "done"
    assert not left.exists()


def test_a_training_that_was_cut_short_ends_as_if_it_never_was(tmp_path):
    """As a worker that was killed leaves it: metrics and ledger of some steps, and the next one goes on from there."""
    from zotune.bench.run.worker import do

    options = {"task": "copa", "model": "random:opt-tiny", "tuning": "lora", "device": "cpu", "seed": 0}
    options |= {"num_train": 8, "num_dev": 4, "num_eval": 4, "max_steps": 6, "eval_steps": 2, "logging_steps": 2}
    options |= {"load_best_model_at_end": True, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    whole = do({"does": "train", "options": options, "folder": str(tmp_path / "whole")})
    cut = tmp_path / "cut"

    class Stop(BaseException):
        pass

    with pytest.MonkeyPatch.context() as patch:
        from zotune.llm.training.loop import Run

        own = Run._count

        def count(self, *args, **kwargs):
            own(self, *args, **kwargs)
            if self.counters.step == 3:
                raise Stop

        patch.setattr(Run, "_count", count)
        with pytest.raises(Stop):
            do({"does": "train", "options": options, "folder": str(cut)})
    again = do({"does": "train", "options": options, "folder": str(cut)})
    assert repeatable(again) == repeatable(whole)
    assert again["run"]["num_steps"] == 6


def test_the_time_left_goes_by_how_far_earlier_cells_were_from_what_was_expected(capsys, monkeypatch):
    from zotune.bench.run import progress as live

    one, two = small_cells()
    now = itertools.count(0, 30)
    monkeypatch.setattr(live.time, "monotonic", lambda: next(now))
    progress = live.Progress({one.path: 1.0, two.path: 4.0}, 1)
    with progress as display:
        display.began(one)
        display.ended(one, "done", "")
        assert capsys.readouterr().err == "[1/2] small/zo_sgd: done (0:30); 2:00 left\n"
        display.began(two)
        table = progress._table()
        assert (table.title, table.row_count) == ("2 cells: 1 done; 2:00 left", 1)
        display.ended(two, "failed", "no luck")
    assert capsys.readouterr().err == "[2/2] small/zo_adam: failed, no luck (1:00); 0:00 left\n"


def test_the_speed_of_a_training_is_that_of_its_second_half(tmp_path):
    from zotune.bench.measure.accuracy import _speed

    # Ten seconds for what is computed once, then two a step.
    lines = [{"step": s, "seconds": 10.0 + 2 * s} for s in (10, 20, 30, 40)]
    assert _speed([{"step": 20, "dev": {}}, *lines], 90.0, 40) == {"seconds_per_step": 2.0, "seconds_before": 10.0}
    assert _speed([], 12.0, 4) == {"seconds_per_step": 3.0, "seconds_before": 0.0}


def test_a_cell_that_another_runner_has_is_left_to_it_and_looked_at_again(tmp_path):
    spec, other = small_cells()
    with locked(tmp_path / "smoke" / JOBS / f"small--{spec.name}.lock") as is_mine:
        assert is_mine()
        run = threading.Thread(target=run_cells, args=([spec, other], tmp_path))
        run.start()
        until = time.monotonic() + 30
        while state_of(tmp_path, other) != "done":
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.5)
        assert (state_of(tmp_path, spec), run.is_alive()) == ("missing", True)
    run.join()
    assert state_of(tmp_path, spec) == "done"
