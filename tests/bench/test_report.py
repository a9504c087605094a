"""The report: tables, figures and files against the results that they show; text from outside; what is not there."""

import csv
import io
import json
import re
import shutil
from urllib.parse import unquote

import numpy as np
import pytest

from bench_cells import run_cells, small_cells
from bench_pages import sound
from bench_results import METHODS, answers, cell, experiment, table_of_methods
from zotune.bench.report.choose_figures import figures
from zotune.bench.report.figures import COLOURS, MARKERS, Figure, Panel, Point, Series, style_of
from zotune.bench.report.findings import findings
from zotune.bench.report.formats import comma_separated, latex, markdown
from zotune.bench.report.html import page
from zotune.bench.report.markdown import markdown_page
from zotune.bench.report.print_figures import draw_panel, figure_files
from zotune.bench.report.sections import make_section
from zotune.bench.report.svg import draw
from zotune.bench.results.cells import Cell
from zotune.bench.results.costs import cell_costs
from zotune.bench.results.quantities import quantity
from zotune.bench.results.records import Trial, mean_and_error, read_result, result_path, write_result
from zotune.bench.results.tables import table
from zotune.cli import main as cli

HOSTILE = "<script>alert('x')</script>&\"|_%\\"
BEST = {"sentence": "A is best", "where": "Tab. 2", "more": [{"method": "fo_sgd"}], "less": [{"method": "zo_adam"}]}


def all_methods(**options):
    return table_of_methods(dict(zip(METHODS, np.linspace(0.9, 0.6, 8), strict=True)), **options)


# Tables ---------------------------------------------------------------------------------------------------


def test_a_table_holds_means_errors_and_how_far_the_paper_is():
    cells = all_methods()
    found = table("table2", experiment(), cells)
    assert [row[1] for row in found.rows] == list(METHODS)
    assert [found.heading(column) for column in found.columns] == ["lora", "full"]
    values = [100 * run.test.value for run in cells[6].result.runs]
    entry = found.entries[3][0]
    assert (entry.mean, entry.error) == pytest.approx(mean_and_error(values))
    assert entry.low < entry.mean < entry.high
    (beside,) = entry.paper
    assert (beside.label, beside.value) == ("opt-1.3b", 90.1)
    assert beside.difference == pytest.approx(entry.mean - 90.1)
    assert found.entries[0][0].paper == ()
    assert found.baselines == (("untuned model", (60.0, 60.0)), ("majority class", (50.0, 50.0)))


def test_a_number_of_the_papers_own_model_stands_without_a_label():
    block = {"source": "Tab. 2", "row": "method", "columns": [{"tuning": "lora"}], "values": {"zo_sgd": [90.1]}}
    (beside,) = table("t", experiment(paper=[block]), all_methods()).entries[3][0].paper
    assert beside.label == ""


def test_amounts_are_shown_as_multiples_of_the_first_also_the_papers():
    block = {"source": "Tab. 4", "metric": "step_bytes", "unit": "GB", "row": "method", "columns": [{}]}
    layout = {"rows": ["method"], "y": ["step_bytes"]}
    asked = experiment(kind="memory", layout=layout, paper=[{**block, "values": {"zo_sgd": [64], "zo_adam": [160]}}])
    cells = [cell({"method": m}, measured=[{"step_bytes": b << 30}]) for m, b in (("zo_sgd", 2), ("zo_adam", 6))]
    found = table("table4", asked, cells)
    assert [row[0].ratio for row in found.entries] == [1.0, 3.0]
    assert [row[0].paper[0].ratio for row in found.entries] == [1.0, 2.5]
    assert "6 (×3.00)<br>paper 160 (×2.50)" in markdown(found)


def test_what_is_missing_failed_or_stale_says_so():
    cells = all_methods()
    cells[1] = Cell(cells[1].coordinates, "missing")
    cells[3] = cell(cells[3].coordinates, state="out_of_memory", message="killed at 6 GiB", runs=())
    cells[5] = Cell(cells[5].coordinates, "stale", cells[5].result)
    shown = make_section("table2", experiment(), cells)
    text = markdown(shown.table)
    for word in ("not run", "out of memory", "†"):
        assert text.count(word) == 1, word
    html = page([shown], "cpu")
    assert "13 of 16 cells done, 1 missing, 1 out of memory, 1 stale" in html
    assert "killed at 6 GiB" in html


def test_rows_of_numbers_stand_in_their_order_and_intervals_of_rates_end_at_their_bounds():
    cells = [cell({"k": k}, np.array([[True] * 5 + [False]])) for k in (8, 0, 12)]
    found = table("t", experiment(layout={"rows": ["k"]}, paper=[]), cells)
    assert found.rows == ((0,), (8,), (12,))
    assert found.entries[0][0].low > 0 and found.entries[0][0].high == 100.0


def test_columns_are_of_what_their_cells_can_have():
    layout = {"rows": ["k"], "columns": ["kind"], "y": ["accuracy", "step_bytes"]}
    cells = [Cell({"k": k, "kind": kind}, "missing") for k in (0, 4) for kind in ("memory", "accuracy")]
    found = table("t", experiment(layout=layout, paper=[]), cells)
    assert [(c.place, c.quantity.name) for c in found.columns] == [
        (("memory",), "step_bytes"),
        (("accuracy",), "accuracy"),
    ]


def test_csv_reads_back_as_the_numbers_of_the_table():
    found = table("table2", experiment(), all_methods())
    rows = list(csv.DictReader(io.StringIO(comma_separated(found))))
    assert len(rows) == 16
    (row,) = (r for r in rows if r["method"] == "zo_adam" and r["tuning"] == "full")
    entry = found.entries[-1][1]
    assert [float(row[k]) for k in ("mean", "low", "high", "difference")] == pytest.approx(
        [entry.mean, entry.low, entry.high, entry.mean - 84.4]
    )
    assert (row["paper"], row["paper_of"], row["state"]) == ("84.4", "opt-1.3b", "done")


def test_latex_and_markdown_escape_what_they_must():
    cells = [cell({"method": HOSTILE, "tuning": "a|b", "model": "m"}, answers(np.random.default_rng(0), 0.8))]
    found = table("t", experiment(paper=[]), cells)
    assert all(line.replace("\\|", "").count("|") == 4 for line in markdown(found).splitlines())
    tex = latex(found, HOSTILE)
    assert not re.search(r"(?<!\\)[_%&]", tex.replace(" & ", " ").splitlines()[5])
    assert r"\textbackslash{}" in tex


# Figures --------------------------------------------------------------------------------------------------


def test_every_point_is_drawn_on_the_page_and_for_papers():
    from matplotlib.figure import Figure as Canvas

    section = make_section("table2", experiment(), all_methods())
    assert {figure.name for figure in section.figures} == {"table2-standing", "table2-spent", "table2-way"}
    for figure in section.figures:
        assert sum(draw(panel, "p").count('class="mark ') for panel in figure.panels) == figure.num_points
        for panel in figure.panels:
            axes = Canvas().add_subplot()
            draw_panel(panel, axes)
            marked = [line for line in axes.lines if line.get_marker() not in ("None", None)]
            drawn = [xy for line in marked for xy in zip(*line.get_data(), strict=True)]
            assert drawn == [(p.x, p.y) for p in panel.points()]


def test_files_for_papers_are_the_same_each_time():
    figure = Figure("f", "t", "s", (Panel("p", "x", "y", (Series("a", (Point(1, 2), Point(2, 3)), joined=True),)),))
    first, second = figure_files(figure), figure_files(figure)
    assert first == second
    assert first["pdf"].startswith(b"%PDF") and b"<svg" in first["svg"]


def test_points_lie_where_their_numbers_say():
    panel = Panel("p", "x", "y", (Series("a", tuple(Point(x, x * x) for x in (0.0, 1.0, 2.0, 3.0))),))
    found = [tuple(map(float, m)) for m in re.findall(r'<circle [^>]*cx="([\d.]+)" cy="([\d.]+)"', draw(panel, "p"))]
    xs, ys = zip(*found, strict=True)
    assert np.diff(xs) == pytest.approx(xs[1] - xs[0], abs=0.11)
    assert xs[0] < xs[1] and ys[0] > ys[1]  # more is right, and up, where y is less
    assert np.diff(ys) == pytest.approx([ys[1] - ys[0], 3 * (ys[1] - ys[0]), 5 * (ys[1] - ys[0])], abs=0.3)
    assert all(36 <= x <= 346 for x in xs) and all(26 <= y <= 206 for y in ys)


def test_an_axis_of_powers_is_even_in_ratios_and_leaves_out_zero():
    panel = Panel("p", "x", "y", (Series("a", tuple(Point(x, 1.0) for x in (0.0, 1.0, 10.0, 100.0))),), log_x=True)
    xs = [float(x) for x in re.findall(r'<circle [^>]*cx="([\d.]+)"', draw(panel, "p"))]
    assert len(xs) == 3
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)


def test_an_empty_or_flat_panel_can_be_drawn():
    for series in ((), (Series("a", (Point(1, 5.0),)),), (Series("a", (Point(0, 0.0), Point(0, 0.0))),)):
        assert draw(Panel("p", "x", "y", series), "p").startswith("<svg")


def test_styles_differ_in_marker_and_colour_and_methods_keep_theirs():
    styles = [style_of(m) for m in METHODS]
    assert len({s % len(COLOURS) for s in styles}) == len({s % len(MARKERS) for s in styles}) == len(METHODS)
    assert len({(i % len(COLOURS), i % len(MARKERS)) for i in range(72)}) == 72


def test_figures_along_an_axis_put_the_papers_curve_beside_ours():
    layout = {"rows": ["k"], "x": "k", "y": ["accuracy", "peak_memory"]}
    block = {"source": "Tab. 7", "row": "k", "columns": [{}], "values": {"0": [91.2], "4": [91.1], "8": [90.8]}}
    rng = np.random.default_rng(0)
    cells = [cell({"k": k}, answers(rng, 0.9)) for k in (0, 4)]
    asked = experiment(layout=layout, paper=[block])
    along = figures("t", asked, cells, table("t", asked, cells))[0]
    ours, paper = along.panels[0].series
    assert [p.x for p in ours.points] == [0, 4] and [p.y for p in paper.points] == [91.2, 91.1, 90.8]
    assert (ours.hollow, paper.hollow) == (False, True)


def test_theory_is_drawn_against_what_was_measured():
    cells = [
        cell({"method": m}, measured=[{"step_bytes": 1.1 * b}], values=[{"formula_bytes": b}])
        for m, b in (("zo_sgd", 2**30), ("zo_adam", 3 * 2**30))
    ]
    asked = experiment(kind="theory", layout={"rows": ["method"], "y": ["formula_bytes", "step_bytes"]}, paper=[])
    (theory,) = (f for f in figures("t", asked, cells, table("t", asked, cells)) if f.name == "t-theory")
    assert [x for p in theory.panels[0].points() for x in (p.x, p.y)] == pytest.approx([1.0, 1.1, 3.0, 3.3])


# Traces ---------------------------------------------------------------------------------------------------


def test_every_number_of_a_verdict_leads_to_the_results_that_it_is_from(tmp_path):
    """From the page by a link to a JSON file, from whose runs the number follows again."""
    cells = all_methods()
    for one in cells:
        write_result(tmp_path / "results", one.result)
    section = make_section("table2", experiment(claims=[BEST, {**BEST, "settings": "some"}]), cells)
    html = page([section], "cpu", "results")
    numbers = re.findall(
        r'<li>(?:lora: |full: )?([+−][0-9.]+) points [^<]*<details class="files">(.*?)</details>', html, re.S
    )
    assert len(numbers) == 3
    for number, files in numbers:
        means = {"fo_sgd": [], "zo_adam": []}
        for address in re.findall(r'href="([^"]+)"', files):
            result = read_result(tmp_path / unquote(address))
            means[result.coordinates["method"]].append(np.mean([100 * run.test.value for run in result.runs]))
        difference = np.mean(means["fo_sgd"]) - np.mean(means["zo_adam"])
        assert float(number.replace("−", "-")) == pytest.approx(difference, abs=0.051)


def test_every_entry_of_a_table_leads_to_its_result():
    section = make_section("table2", experiment(), all_methods())
    html = page([section], "cpu", "results")
    links = re.findall(r'<a class="ours" href="([^"]+)">([0-9.]+) ±', html)
    expected = {
        f"results/{c.source}": f"{100 * np.mean([r.test.value for r in c.result.runs]):.1f}" for c in section.cells
    }
    assert dict(links) == expected


def test_stale_results_have_a_banner():
    cells = [Cell(c.coordinates, "stale", c.result) for c in all_methods()]
    section = make_section("table2", experiment(), cells)
    assert "<strong>16 of 16 results are stale (†):</strong>" in page([section], "cpu")
    assert "are stale" not in page([make_section("table2", experiment(), all_methods())], "cpu")


def test_claims_stand_by_subject_with_the_papers_own_numbers():
    memory = {"sentence": "B takes more", "where": "", "of": "step_bytes", "more": [{"method": "fo_sgd"}]}
    claims = [BEST, {**memory, "less": [{"method": "zo_adam"}]}]
    own = {"more": [{"method": "zo_sgd"}], "less": [{"method": "zo_adam"}], "contradicted_by": "It is lower there."}
    section = make_section("table2", experiment(claims=[*claims, {**BEST, **own}]), all_methods())
    assert section.on_paper == (None, None, "holds")
    html = page([section], "cpu")
    heads = re.findall(r'<h3 id="claims-\d">(.*?)</h3>', html)
    assert heads == ["Accuracy", "Memory and time"]
    assert "It is lower there." in html


def test_findings_are_sentences_from_the_results():
    section = make_section(
        "table2",
        experiment(claims=[BEST], layout={"rows": ["method"], "columns": ["tuning"], "ranked": "method"}),
        all_methods(),
    )
    texts = [one.text for one in findings([section])]
    assert len(texts) == 3
    assert texts[0].startswith("On sst2 with all weights, fo_sgd is best (")
    assert "for the same lora, fo_sgd" in texts[1] and texts[2] == "Of the paper's 1 claims, about accuracy: 1 holds."


# The page -------------------------------------------------------------------------------------------------


def test_the_page_is_sound_small_and_shows_every_number():
    section = make_section("table2", experiment(claims=[BEST]), all_methods())
    html = page([section], "cpu")
    read = sound(html)
    assert len(html) < 200_000
    for entries in section.table.entries:
        for entry in entries:
            assert f"{entry.mean:.1f} ± {entry.error:.1f}" in html
    drawn = [a for tag, a in read.tags if tag == "figure"]
    assert [(int(a["data-points"])) for a in drawn] == [figure.num_points for figure in section.figures]
    for text in ("A is best", "✓ holds", "Only the order of the methods.", "paper (opt-1.3b) 90.1", "untuned model"):
        assert text in html


def test_the_markdown_page_has_every_table_number_verdict_and_what_was_spent():
    missing = [Cell(c.coordinates, "missing") for c in all_methods()]
    full, empty = (make_section("table2", experiment(claims=[BEST]), cells) for cells in (all_methods(), missing))
    text = markdown_page([full], "Results", "Of a made-up model.")
    assert text.startswith("# Results\n\nOf a made-up model.\n\n- On sst2")
    for entries in full.table.entries:
        for entry in entries:
            assert f"{entry.mean:.1f} ± {entry.error:.1f}" in text
    assert "Of 1 claims, on this model: 1 holds." in text
    assert (
        "- **holds** (on the paper's own numbers: no numbers): A is best" in text
        and "Only the order of the methods. The model is another one." in text
    )
    spent = [line for line in text.split("<details>")[1].splitlines() if line.startswith("| ")]
    assert len(spent) == 1 + len(full.cells)
    assert all(line.count("|") == spent[0].count("|") for line in spent)
    bare = markdown_page([empty], "Results")
    assert bare.count("not run") == 16 and "- **cannot be told**" in bare and "<details>" not in bare


@pytest.mark.parametrize(
    "rates, said",
    [
        ([1e-3], None),
        ([1e-4, 1e-3, 1e-2], "0.0001 to 0.01"),
        ([1e-4, 1e-3], "0.0001 to 0.001, the greatest chosen"),
        ([1e-2, 1e-3], "0.001 to 0.01, the least chosen"),
    ],
)
def test_a_learning_rate_at_the_end_of_what_was_searched_is_called_so(rates, said):
    trials = tuple(Trial(learning_rate=rate, seed=0) for rate in rates)
    (spent,) = cell_costs([cell({"method": "a"}, answers(np.random.default_rng(0), 0.7), search=trials)])
    assert spent["rates searched"] == said


def test_an_interval_below_zero_is_shown_and_one_measurement_has_none():
    worse = {
        "sentence": "The worst is best",
        "where": "",
        "more": [{"method": "zo_adam"}],
        "less": [{"method": "fo_sgd"}],
    }
    text = markdown_page([make_section("table2", experiment(claims=[worse]), all_methods())], "t")
    assert re.search(r"  - −[0-9.]+ points \(−[0-9.]+ to −[0-9.]+\); 3 runs in each of 4 cells × 200 rows", text), text
    alone = [cell({"method": m}, measured=[{"step_bytes": b}]) for m, b in (("a", 3.0), ("b", 1.0))]
    claim = {"sentence": "a takes more", "where": "", "of": "step_bytes", "more": [{"method": "a"}]}
    asked = experiment(
        claims=[{**claim, "less": [{"method": "b"}]}], paper=[], kind="memory", layout={"rows": ["method"]}
    )
    assert "×3.00 (one measurement, no interval)" in markdown_page([make_section("t", asked, alone)], "t")


def test_hostile_text_stays_text():
    rng = np.random.default_rng(0)
    cells = [
        cell({"method": HOSTILE, "tuning": HOSTILE, "model": m}, answers(rng, 0.8), cell=HOSTILE, commit=HOSTILE)
        for m in "ab"
    ]
    cells.append(cell({"method": "x", "tuning": HOSTILE, "model": "a"}, state="failed", message=HOSTILE, runs=()))
    asked = {"sentence": HOSTILE, "where": HOSTILE, "more": [{"model": "a"}], "less": [{"model": "b"}]}
    texts = {"title": HOSTILE, "question": HOSTILE, "comparable": HOSTILE, "claims": [asked]}
    html = page([make_section("t", experiment(**texts), cells)], HOSTILE)
    sound(html)
    assert "alert(" in html and "<script" not in html.lower()


def test_without_results_the_page_says_so():
    sound(page([], "cpu"))
    cells = [Cell(c.coordinates, "missing") for c in all_methods()]
    section = make_section("table2", experiment(claims=[BEST]), cells)
    assert section.figures == ()
    html = page([section], "cpu")
    sound(html)
    assert html.count("not run") == 16 and "? cannot be told" in html


def test_a_new_method_and_task_appear_everywhere_by_their_cells_alone():
    rng = np.random.default_rng(0)
    cells = [
        cell({"method": m, "task": t}, answers(rng, 0.8))
        for m in ("zo_sgd", "zo_brandnew")
        for t in ("sst2", "newtask")
    ]
    section = make_section("t", experiment(layout={"rows": ["method"], "columns": ["task"]}, paper=[]), cells)
    html = page([section], "cpu")
    assert all(any("zo_brandnew" in s.name for p in f.panels for s in p.series) for f in section.figures[1:])
    for text in (
        html,
        markdown(section.table),
        comma_separated(section.table),
        latex(section.table, "").replace("\\", ""),
    ):
        assert "zo_brandnew" in text and "newtask" in text


# The command ----------------------------------------------------------------------------------------------

SMALL = """
title = "small"
question = "?"
comparable = "nothing"
seeds = [0, 1]
[layout]
rows = ["method"]
[axes]
method = ["zo_sgd", "zo_adam"]
[options]
task = "copa"
model = "random:opt-tiny"
tuning = "lora"
[scale.smoke]
seeds = [0, 1]
[scale.smoke.search]
learning_rate = [1e-3, 1e-2]
"""


@pytest.fixture
def results(tmp_path):
    """Results of a table of one's own, as the runner leaves them; the table's file."""
    run_cells(small_cells(), tmp_path / "results")
    (tmp_path / "small.toml").write_text(SMALL, encoding="utf-8")
    return tmp_path / "results"


def reported(results, *more):
    args = ["bench", "report", str(results.parent / "small.toml"), "--results", str(results), "--scale", "smoke", *more]
    return cli.run(args)


def test_the_command_writes_page_tables_and_figures(results, capsys):
    assert reported(results, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    folder = results / "report-smoke"
    assert found["page"] == str(folder / "index.html")
    endings = {p.suffix for p in folder.rglob("*") if p.is_file()}
    assert endings == {".html", ".md", ".csv", ".tex", ".pdf", ".svg", ".json"}
    html = (folder / "index.html").read_text(encoding="utf-8")
    sound(html)
    assert "2 cells, done" in html


def test_a_report_replaces_what_it_wrote_and_renames_what_it_did_not(results):
    folder = results / "report-smoke"
    (folder / "tables").mkdir(parents=True)
    for name in ("index.html", "tables/small.csv", "notes.txt"):
        (folder / name).write_text("mine", encoding="utf-8")
    assert reported(results) == 0
    first = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {str(p.relative_to(folder)) for p, content in first.items() if content == b"mine"} == {
        *("index.html.saved", "tables/small.csv.saved", "notes.txt")
    }
    assert reported(results) == 0
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}.keys() == first.keys()


def test_a_result_of_other_code_is_marked(results, capsys):
    path = result_path(results, "smoke", "small", "zo_adam")
    write_result(results, read_result(path).model_copy(update={"key": "0" * 16}))
    assert reported(results) == 0
    html = (results / "report-smoke/index.html").read_text(encoding="utf-8")
    assert "1 of 2 cells done, 1 stale" in html and html.count("†") >= 1


def test_an_empty_folder_has_a_report_too(tmp_path, capsys):
    (tmp_path / "small.toml").write_text(SMALL, encoding="utf-8")
    assert reported(tmp_path / "results") == 0
    sound((tmp_path / "results/report-smoke/index.html").read_text(encoding="utf-8"))


def test_a_file_that_is_no_result_is_an_error_that_names_it(results, capsys):
    path = result_path(results, "smoke", "small", "zo_adam")
    path.write_text("{}", encoding="utf-8")
    assert reported(results) == 2
    assert str(path) in capsys.readouterr().err


def test_the_whole_benchmark_reports_at_every_scale(tmp_path, capsys):
    for scale in ("smoke", "cpu", "paper"):
        assert cli.run(["bench", "report", "--results", str(tmp_path), "--scale", scale]) == 0
        html = (tmp_path / f"report-{scale}/index.html").read_text(encoding="utf-8")
        sound(html)
        shutil.rmtree(tmp_path / f"report-{scale}")


def test_quantities_know_their_units():
    assert (quantity("peak_memory").unit, quantity("seconds_per_step").unit, quantity("cosine").unit) == (
        "GiB",
        "s",
        "",
    )
