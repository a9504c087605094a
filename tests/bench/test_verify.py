"""`zotune bench verify` accepts what today's code finds again, to the bit, and leaves everything else as it is."""

import json
import threading
from pathlib import Path

import pytest

from bench_cells import Silent, contents, here, made_up, run_cells, small_cells
from zotune.bench.results.records import read_result, repeatable, result_path
from zotune.bench.run.jobs import Job, Outcome, locked
from zotune.bench.run.runner import lock_of, state_of
from zotune.bench.spec.selection import chosen_cells
from zotune.bench.verify.checkout import commit_of
from zotune.bench.verify.groups import grouped, stale_of
from zotune.bench.verify.verify import verify
from zotune.cli import bench as commands
from zotune.errors import UsageError

SEVERAL = {"axes": {"method": ["zo_sgd", "zo_adam"], "num_queries": [2, 4]}}
MEASURED = {
    "kind": "memory",
    "axes": {"method": ["zo_sgd"], "length": [64, 128]},
    "options": {"model": "random:opt-tiny", "num_steps": 2},
    "search": {},
    "scale": {"smoke": {}},
    "seeds": [0],
}


class Counting:
    """An executor that keeps the jobs it is given."""

    def __init__(self, execute=made_up, before=None):
        self.execute, self.before, self.jobs = execute, before, []

    def __call__(self, job, folder):
        if len(self.jobs) == self.before:
            raise KeyboardInterrupt
        self.jobs.append(job)
        return self.execute(job, folder)


@pytest.fixture
def other_code(monkeypatch):
    """From here on the code is other than it was."""
    return lambda name="other": monkeypatch.setattr("zotune.bench.keys.content_key.code_of", lambda config: name)


def verified(results, specs, executor=made_up, before=None):
    found, left = stale_of(results, specs)
    return verify(results, grouped(found), ((executor, before),), threading.Event(), Silent()), left


def bytes_of(results):
    return {path: path.read_bytes() for path in Path(results).rglob("*.json") if ".jobs" not in path.parts}


def tamper(results, spec, change):
    """Edit the stored result of a cell."""
    path = result_path(results, spec.scale, spec.experiment, spec.name)
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


def test_one_run_of_each_kind_is_found_again_and_the_rest_is_accepted(tmp_path, other_code):
    specs = small_cells(**SEVERAL)
    run_cells(specs, tmp_path)
    before = contents(tmp_path)
    other_code()
    assert {state_of(tmp_path, spec) for spec in specs} == {"stale"}
    again = Counting()
    verdicts, left = verified(tmp_path, specs, again)
    assert left == {}
    assert sorted(len(verdict.accepted) for verdict in verdicts) == [2, 2]
    assert {state_of(tmp_path, spec) for spec in specs} == {"done"}
    # The zero-shot, which both share, and a run of each method; no trial, and no run of the second seed.
    assert sorted((job.role, job.options.get("method"), job.options.get("seed")) for job in again.jobs) == [
        ("baseline", None, None),
        ("run", "zo_adam", 0),
        ("run", "zo_sgd", 0),
    ]
    for path, plain in contents(tmp_path).items():
        (record,) = plain.pop("verified")
        assert record["key_before"] == before[path].pop("key") != plain.pop("key")
        assert record["by"].split("--")[0] == f"small/{plain['coordinates']['method']}"
        assert before[path].pop("verified") == []
        assert plain == before[path]


def test_a_result_is_verified_again_and_keeps_the_records(tmp_path, other_code):
    (spec, _) = small_cells()
    run_cells([spec], tmp_path)
    for name in ("second", "third"):
        other_code(name)
        verified(tmp_path, [spec])
    result = read_result(result_path(tmp_path, "smoke", "small", spec.name))
    assert len({record.key_before for record in result.verified} | {result.key}) == 3
    assert state_of(tmp_path, spec) == "done"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda plain: plain["runs"][0]["test"].update(value=0.123), "runs[0].test.value: 0.123 before"),
        (lambda plain: plain["runs"][0].update(num_forwards=7), "runs[0].num_forwards: 7 before, 0 now"),
        (lambda plain: plain["baselines"]["zero_shot"].update(value=0.123), "baselines.zero_shot.value: 0.123"),
        (lambda plain: plain["chosen"].update(learning_rate=1.0), "chosen.learning_rate: 1.0 before"),
        (lambda plain: [t.update(dev_loss=-t["dev_loss"]) for t in plain["search"]], "chosen.learning_rate"),
    ],
)
def test_a_number_that_is_another_leaves_its_kind_stale_and_untouched(change, said, tmp_path, other_code):
    specs = small_cells(**SEVERAL)
    run_cells(specs, tmp_path)
    cheapest = grouped([*stale_of_all(tmp_path, specs, other_code)])[0].cheapest.spec
    tamper(tmp_path, cheapest, change)
    before = bytes_of(tmp_path)
    verdicts, _ = verified(tmp_path, specs)
    bad, good = sorted(verdicts, key=lambda verdict: len(verdict.accepted))
    assert (bad.group.cheapest.spec, len(bad.left), len(good.accepted)) == (cheapest, 2, 2)
    assert any(line.startswith(said) for line in bad.differences), bad.differences
    method = cheapest.coordinates["method"]
    for path, text in bytes_of(tmp_path).items():
        assert (text == before[path]) == path.name.startswith(f"{method}--")
    assert {state_of(tmp_path, s) for s in specs if s.coordinates["method"] == method} == {"stale"}


def stale_of_all(results, specs, other_code):
    other_code()
    found, left = stale_of(results, specs)
    assert len(found) == len(specs) and not left
    return found


def test_what_a_clock_or_a_gauge_said_may_differ_where_a_cell_is_not_about_it(tmp_path, other_code):
    specs = small_cells()
    run_cells(specs, tmp_path)
    other_code()

    def slower(job, folder):
        found = made_up(job).found
        if "run" in found:
            found["run"] |= {"seconds": 99.0, "peak_memory": 1, "measured": {"seconds_per_step": 9.0}}
        return Outcome("done", found=found)

    verdicts, _ = verified(tmp_path, specs, slower)
    assert [verdict.differences for verdict in verdicts] == [(), ()]


def test_a_job_that_fails_leaves_its_kind_stale(tmp_path, other_code):
    specs = small_cells()
    run_cells(specs, tmp_path)
    other_code()

    def fails(job, folder):
        return Outcome("failed", "no luck") if job.options.get("method") == "zo_adam" else made_up(job)

    bad, good = sorted(verified(tmp_path, specs, fails)[0], key=lambda verdict: len(verdict.accepted))
    assert bad.differences == ("its job failed when it was run again: failed, seed 0: no luck",)
    assert (len(good.accepted), state_of(tmp_path, bad.group.cheapest.spec)) == (1, "stale")


def test_a_result_of_another_config_or_that_is_not_done_is_left_with_the_reason(tmp_path, other_code):
    specs = small_cells(**SEVERAL)
    run_cells(specs, tmp_path)
    options = {"task": "copa", "model": "random:opt-tiny", "tuning": "prefix"}
    changed = small_cells(**SEVERAL, options=options)
    before = bytes_of(tmp_path)
    none = Counting()
    verdicts, left = verified(tmp_path, changed, none)
    assert (verdicts, none.jobs) == ([], [])
    assert set(left.values()) == {"the config of the cell has changed"} and len(left) == 4
    tamper(tmp_path, specs[0], lambda plain: plain.update(status="timed_out"))
    other_code()
    assert stale_of(tmp_path, specs)[1] == {specs[0].path: "it is not done: timed_out"}
    assert [text for path, text in bytes_of(tmp_path).items() if path.stem != specs[0].name] == [
        text for path, text in before.items() if path.stem != specs[0].name
    ]


def test_results_of_a_kind_came_from_one_commit_and_machine_and_differ_in_amounts_alone(tmp_path, other_code):
    specs = small_cells(axes={"method": ["zo_sgd"], "num_queries": [1, 2, 3, 4, 5]})
    run_cells(specs, tmp_path)
    found = stale_of_all(tmp_path, specs, other_code)
    assert sorted(len(group.members) for group in grouped(found)) == [1, 4]
    assert [len(group.members) for group in grouped(found, "method")] == [5]
    tamper(tmp_path, specs[1], lambda plain: plain.update(commit="another"))
    tamper(tmp_path, specs[2], lambda plain: plain.update(environment={"processor": "another"}))
    assert sorted(len(group.members) for group in grouped(stale_of(tmp_path, specs)[0])) == [1, 1, 1, 2]


def test_results_in_different_precisions_are_of_different_kinds(tmp_path, other_code):
    """First-order methods run other code in half precision, so that single precision proves nothing for it."""
    specs = small_cells(axes={"method": ["zo_sgd"], "dtype": ["float32", "bfloat16"]})
    run_cells(specs, tmp_path)
    found = stale_of_all(tmp_path, specs, other_code)
    assert len({spec.options["dtype"] for spec in specs}) == 2
    assert [len(group.members) for group in grouped(found, "method")] == [1, 1]


def test_a_run_is_found_again_with_as_many_threads(tmp_path, other_code):
    (spec, _) = small_cells()
    run_cells([spec], tmp_path)
    tamper(tmp_path, spec, lambda plain: plain.update(environment={"cpu_threads": "3"}))
    other_code()
    again = Counting()
    verified(tmp_path, [spec], again)
    assert [job.environment for job in again.jobs] == [{"OMP_NUM_THREADS": "3"}] * 2


def measuring(seconds=1.0, size=1e9, processor="one", predicted=5.0):
    """An executor whose steps take so much."""
    numbers = {"seconds_per_step": seconds, "step_bytes": size}

    def execute(job, folder):
        run = {
            "seed": 0,
            "values": {"predicted_bytes": predicted},
            "measured": numbers,
            "seconds": job.options["length"],
        }
        return Outcome("done", found={"run": run, "environment": {"processor": processor}})

    return execute


@pytest.mark.parametrize(
    "now, said",
    [
        ({}, None),
        ({"seconds": 1.14, "size": 0.98e9}, None),
        ({"seconds": 1.2}, "runs[0].measured.seconds_per_step: 1.0 before, 1.2 now; it may differ by 15%"),
        ({"size": 1.04e9}, "runs[0].measured.step_bytes"),
        ({"processor": "other"}, "environment.processor: 'one' before, 'other' now"),
        ({"predicted": 5.1}, "runs[0].values.predicted_bytes: 5.0 before, 5.1 now"),
    ],
)
def test_cells_about_measured_numbers_are_accepted_where_these_are_near_enough(now, said, tmp_path, other_code):
    specs = small_cells(**MEASURED)
    run_cells(specs, tmp_path, measuring())
    other_code()
    (verdict,), _ = verified(tmp_path, specs, measuring(**now))
    assert verdict.group.cheapest.spec.options["length"] == 64
    if said is None:
        assert (verdict.differences, len(verdict.accepted)) == ((), 2)
        assert {state_of(tmp_path, spec) for spec in specs} == {"done"}
    else:
        assert verdict.differences[0].startswith(said)
        assert {state_of(tmp_path, spec) for spec in specs} == {"stale"}


def test_interrupted_in_any_job_it_leaves_whole_files_and_goes_on(tmp_path, other_code):
    specs = small_cells(**SEVERAL)
    for after in range(3):
        results = tmp_path / str(after)
        other_code("first")
        run_cells(specs, results)
        before = contents(results)
        other_code("second")
        first, second = Counting(before=after), Counting()
        verified(results, specs, first)
        states = [state_of(results, spec) for spec in specs]
        assert states.count("done") == (2 if after == 2 else 0)
        assert repeatable(without_keys(contents(results))) == repeatable(without_keys(before))
        verified(results, specs, second)
        assert {state_of(results, spec) for spec in specs} == {"done"}
        assert len(first.jobs) + len(second.jobs) == 3


def without_keys(found):
    return {path: {k: v for k, v in plain.items() if k not in ("key", "verified")} for path, plain in found.items()}


def test_a_write_that_is_cut_short_leaves_the_file_as_it_was(tmp_path, other_code, monkeypatch):
    (spec, _) = small_cells()
    run_cells([spec], tmp_path)
    other_code()
    before, replace = bytes_of(tmp_path), Path.replace

    def cut(self, target):
        if ".jobs" in self.parts:
            return replace(self, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut)
        assert verified(tmp_path, [spec])[0] == []
    assert bytes_of(tmp_path) == before
    verified(tmp_path, [spec])
    assert state_of(tmp_path, spec) == "done"


def test_a_result_that_another_runner_writes_is_left_to_it(tmp_path, other_code):
    spec, other = small_cells()
    run_cells([spec, other], tmp_path)
    other_code()
    with locked(lock_of(tmp_path, spec)) as is_mine:
        assert is_mine()
        verdicts, _ = verified(tmp_path, [spec, other])
    assert {k: v for verdict in verdicts for k, v in verdict.left.items()} == {spec.path: "another runner works on it"}
    (group,) = grouped(stale_of(tmp_path, [spec])[0])
    run_cells([spec], tmp_path)  # anew, by today's code
    (verdict,) = verify(tmp_path, [group], ((made_up, None),), threading.Event(), Silent())
    assert verdict.left == {spec.path: "it was rewritten meanwhile"}


# Against other code on this machine ------------------------------------------------------------------------


def test_against_the_code_of_the_results_the_two_are_compared_and_not_the_stored_numbers(tmp_path, other_code):
    specs = small_cells(**SEVERAL)
    run_cells(specs, tmp_path)
    other_code()

    def rounded(job, folder):
        """Another processor: all numbers are a little others than those that are stored."""
        found = made_up(job).found
        scores = found.get("scores") or {name: found["run"][name] for name in ("test",)}
        for score in scores.values():
            score["value"] += 1e-9
        return Outcome("done", found=found)

    verdicts, _ = verified(tmp_path, specs, rounded)
    assert all(verdict.differences for verdict in verdicts)
    before = Counting()
    verdicts, _ = verified(tmp_path, specs, rounded, before)
    # The old code is run, though jobs of the same options are kept; it is not the new one, which differs.
    assert len(before.jobs) == 4 and all(verdict.differences for verdict in verdicts)
    verdicts, _ = verified(tmp_path, specs, rounded, rounded)
    assert [verdict.differences for verdict in verdicts] == [(), ()]
    assert {state_of(tmp_path, spec) for spec in specs} == {"done"}


def test_against_a_checkout_results_of_other_commits_are_left(tmp_path, other_code):
    specs = small_cells()
    run_cells(specs, tmp_path)
    for spec, commit in zip(specs, ("a", "b"), strict=True):
        tamper(tmp_path, spec, lambda plain, commit=commit: plain.update(commit=commit))
    other_code()
    found, left = stale_of(tmp_path, specs, "a")
    assert [one.spec.path for one in found] == [specs[0].path]
    assert left == {specs[1].path: "it was computed by the code of b, not of a"}


def test_a_checkout_must_be_of_a_commit_and_unchanged(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="is no checkout"):
        commit_of(tmp_path)
    (tmp_path / "src" / "zotune").mkdir(parents=True)
    for found, said in (("unknown", "is no checkout"), ("abc+", "was changed")):
        monkeypatch.setattr("zotune.bench.verify.checkout.commit", lambda package, found=found: found)
        with pytest.raises(UsageError, match=said):
            commit_of(tmp_path)
    monkeypatch.setattr("zotune.bench.verify.checkout.commit", lambda package: "abc")
    assert commit_of(tmp_path) == "abc"


def test_a_worker_of_another_checkout_finds_its_own_code_and_is_not_asked_for_todays(tmp_path):
    worker = tmp_path / "src" / "zotune" / "bench" / "deep" / "worker.py"
    worker.parent.mkdir(parents=True)
    for folder in ("", "bench", "bench/deep"):
        (tmp_path / "src" / "zotune" / folder / "__init__.py").touch()
    lines = "import json, os, sys\nline = json.loads(sys.stdin.readline())\n"
    lines += "found = {'keys': sorted(line), 'threads': os.environ['OMP_NUM_THREADS']}\n"
    worker.write_text(f"{lines}open(line['folder'] + '/found.json', 'w').write(json.dumps(found))\n")
    args = commands._parser().parse_args(["verify", "--against", str(tmp_path)])
    ((today, before),) = commands._slots_of_both(args, threading.Event())
    assert today.source is None
    outcome = before(Job("train", {}, environment={"OMP_NUM_THREADS": "7"}), tmp_path)
    assert outcome.found == {"keys": ["does", "folder", "gib", "options"], "threads": "7"}


# The command -----------------------------------------------------------------------------------------------


def run_command(capsys, *args):
    code = commands.run(["verify", "table8", "--scale", "smoke", *map(str, args)], as_json=True)
    return code, json.loads(capsys.readouterr().out)


def test_the_command_lists_accepts_and_says_by_its_exit_code_whether_all_is_current(
    tmp_path, other_code, capsys, monkeypatch
):
    executor = Counting()
    monkeypatch.setattr(commands, "_slots", lambda args, stop: [executor])
    where = ("--results", tmp_path)
    assert run_command(capsys, *where) == (0, {"kinds": [], "left": {}})
    (specs,) = chosen_cells(["table8"], "smoke").values()
    run_cells(specs, tmp_path)
    assert run_command(capsys, *where) == (0, {"kinds": [], "left": {}})
    other_code()
    before = bytes_of(tmp_path)
    code, found = run_command(capsys, *where, "--dry-run")
    assert (code, executor.jobs, bytes_of(tmp_path)) == (0, [], before)
    assert sorted(path for kind in found["kinds"] for path in kind["results"]) == sorted(s.path for s in specs)
    assert {kind["by"] for kind in found["kinds"]} <= {spec.path for spec in specs}
    chosen = next(spec for spec in specs if spec.path == found["kinds"][0]["by"])
    tamper(tmp_path, chosen, lambda plain: plain["runs"][0]["test"].update(value=0.123))
    code, found = run_command(capsys, *where)
    assert (code, {path for kind in found["kinds"] for path in kind["accepted"]}) == (
        1,
        {spec.path for spec in specs if state_of(tmp_path, spec) == "done"},
    )
    assert "0.123 before" in str([kind["differences"] for kind in found["kinds"]])
    assert commands.run(["verify", "table8", "--scale", "smoke", "--results", str(tmp_path)], as_json=False) == 1
    text = capsys.readouterr().out
    assert f"{chosen.path} differs" in text and "    runs[0].test.value: 0.123 before" in text
    run_cells(specs, tmp_path)
    assert run_command(capsys, *where) == (0, {"kinds": [], "left": {}})


def test_a_real_run_is_found_again_to_the_bit(tmp_path, other_code):
    (specs,) = chosen_cells(["table8"], "smoke", ["table8/0.5*"]).values()
    other_code("before")
    run_cells(specs, tmp_path, here)
    other_code("after")
    (verdict,), _ = verified(tmp_path, specs, here)
    assert verdict.differences == ()
    assert {state_of(tmp_path, spec) for spec in specs} == {"done"}
    assert read_result(result_path(tmp_path, "smoke", "table8", specs[0].name)).verified[0].environment["torch"]


def test_results_without_a_record_are_read():
    for path in Path(__file__).parents[1].glob("benchmarks/results/bench/cpu/table2/*.json"):
        assert read_result(path).verified == ()
