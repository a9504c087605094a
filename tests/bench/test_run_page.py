"""The page of a single run: written by `zotune train`, made again at any time, never the reason that a run fails."""

import json
import re
import shutil
import sys

import pytest

from bench_pages import sound
from zotune.bench.report import run_html as run_page
from zotune.bench.report.run_html import PAGE, figures
from zotune.cli import main as cli

TRAIN = [
    "train",
    "--model",
    "random:llama-tiny",
    "--device",
    "cpu",
    "--task",
    "sst2",
    "--tuning",
    "lora",
    "--seed",
    "1",
]
SHORT = ["--max-steps", "6", "--num-train", "8", "--num-dev", "8", "--num-eval", "8", "--logging-steps", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was evaluated on the way."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert cli.run([*TRAIN, *SHORT, "--eval-steps", "3", "--output-dir", str(out)]) == 0
    return out


def test_training_writes_a_page_with_its_results(run):
    html = (run / PAGE).read_text(encoding="utf-8")
    read = sound(html)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert f"{100 * results['test']['accuracy']:.1f} %" in html
    assert f"{results['num_tuned']:,} tuned parameters" in html
    assert "learning_rate: " in html
    drawn = {a["id"]: int(a["data-points"]) for tag, a in read.tags if tag == "figure"}
    # 3 logged losses, and at steps 0, 3 and 6 the held-out loss and metric, over passes and over seconds.
    assert drawn == {"course-num_forwards": 9, "course-seconds": 9, "course-memory": 3}
    assert html.count('class="mark ') == sum(drawn.values())


def test_the_page_is_the_same_when_made_again(run, capsys):
    before = (run / PAGE).read_bytes()
    (run / PAGE).unlink()
    assert cli.run(["bench", "report", "--run", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(run / PAGE)}
    assert (run / PAGE).read_bytes() == before


def test_a_folder_without_a_finished_run_is_refused(tmp_path, capsys):
    assert cli.run(["bench", "report", "--run", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_what_was_found_between_logged_steps_lies_between_them(run):
    lines = [{"step": s, "num_forwards": 10 * s, "seconds": 1.0 * s, "loss": 1.0, "peak_memory": 1} for s in (2, 4)]
    found = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "loss": 0.7}
    lines.insert(1, {"step": 3, "dev": found})
    over_passes = next(figures([*lines, {"step": 9, "dev": found}], {}))
    assert [p.x for p in over_passes.panels[1].points()] == [30, 40]


def test_a_long_run_has_no_more_points_than_a_page_shows():
    lines = [{"step": s, "num_forwards": s, "seconds": s, "loss": 1.0, "peak_memory": 1} for s in range(1, 5001)]
    found = list(figures(lines, {}))
    assert all(len(series.points) <= 201 for f in found for p in f.panels for series in p.series)
    assert found[0].panels[0].series[0].points[-1].x == 5000


def test_a_loss_that_is_no_number_leaves_a_gap(run, tmp_path):
    for name in ("results.json", "config.yaml"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines[0] = re.sub(r'"loss": [^,]*', '"loss": null', lines[0])
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 7, "lo']), encoding="utf-8")
    assert cli.run(["bench", "report", "--run", str(tmp_path)]) == 0
    sound((tmp_path / PAGE).read_text(encoding="utf-8"))


def test_without_the_extra_there_is_no_page_and_no_complaint(tmp_path, monkeypatch, capsys):
    for name in ("report.run_html", "report.report"):
        monkeypatch.setitem(sys.modules, f"zotune.bench.{name}", None)  # their import fails as without jinja2
    assert cli.run([*TRAIN, *SHORT, "--output-dir", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / PAGE).exists()
    assert "extra" not in capsys.readouterr().err
    assert cli.run(["bench", "report", "--run", str(tmp_path / "out")]) == 2
    assert "pip install 'zotune[bench]'" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_does_not_fail_the_run(tmp_path, monkeypatch, capsys):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_page, "write_run_page", full)
    assert cli.run([*TRAIN, *SHORT, "--output-dir", str(tmp_path / "out")]) == 0
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "out/results.json").is_file()


def test_a_new_run_in_the_folder_takes_the_old_page_away(run, monkeypatch, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run, out)
    assert (out / PAGE).is_file()
    monkeypatch.setitem(sys.modules, "zotune.bench.report.run_html", None)
    assert cli.run([*TRAIN, *SHORT, "--output-dir", str(out), "--overwrite-output-dir"]) == 0
    assert not (out / PAGE).exists()


@pytest.mark.parametrize("scores", [{"log_loss": 2.0}, {"reward": -3.0}], ids=lambda scores: next(iter(scores)))
def test_the_interval_of_a_single_row_is_left_open(run, tmp_path, scores):
    """JSON has null for the infinite ends of such an interval."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Q{i}:", "completion": f" {i}"}) + "\n" for i in range(5)))
    unknown = {**scores, "low": None, "high": None, "num_examples": 1, "loss": 2.5}
    assert run_page._score("rows", unknown) == ["rows", *scores, f"{next(iter(scores.values())):g}", "–", "1", "2.5000"]
    lines = [{"step": s, "num_forwards": s, "seconds": 1.0, "loss": 1.0, "peak_memory": 1} for s in (2, 4)]
    drawn = [point for figure in figures([*lines, {"step": 3, "dev": unknown}], {"dev_before": unknown})
             for panel in figure.panels for point in panel.points()]  # fmt: skip
    assert drawn and all(point.low is None and point.high is None for point in drawn)
    out = tmp_path / "out"
    model = ["train", "--model", "random:llama-tiny", "--device", "cpu", "--max-steps", "1", "--train-file", str(rows)]
    assert cli.run([*model, "--tuning", "lora", "--output-dir", str(out)]) == 0
    assert "<td>–</td>" in sound_page(out)


def sound_page(folder):
    html = (folder / PAGE).read_text(encoding="utf-8")
    sound(html)
    return re.sub(r"<td[^>]*>", "<td>", html)


ODD = {
    "metrics.jsonl": [
        "[]\n",
        "3\n",
        '{"step": "x"}\n',
        '{"step": 1, "dev": []}\n',
        "\0\n",
        "{}\n{}\n",
        '{"step": 1e999}\n',
    ],
    "results.json": [
        "[]",
        "3",
        "{}",
        '{"config": 1}',
        "",
        "[" * 9999,
        '{"config": {"model": "m"}, "dev": {"low": "x"}}',
    ],
    "config.yaml": ["\udcff"],
}


@pytest.mark.parametrize(("name", "content"), [(name, c) for name, all_ in ODD.items() for c in all_])
def test_odd_files_of_a_run_are_told_in_a_sentence(run, tmp_path, capsys, name, content):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    assert cli.run(["bench", "report", "--run", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("zotune: ")
    assert str(tmp_path / "run") in err
    assert "Traceback" not in err
