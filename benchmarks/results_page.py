"""Write docs/benchmark/results.md from the results in benchmarks/results/bench/cpu; a test holds the page to it.

python benchmarks/results_page.py > docs/benchmark/results.md
"""

from __future__ import annotations

from pathlib import Path

from zotune.bench.report.markdown import markdown_page
from zotune.bench.report.sections import Section, make_section
from zotune.bench.results.records import read_result, result_path
from zotune.bench.results.tables import Cell
from zotune.bench.spec.resolve import cells, find, names
from zotune.bench.spec.schema import CellSpec

RESULTS = Path(__file__).parent / "results" / "bench"
_INTRODUCTION = """
These are results of SmolLM2-135M (accuracy) and of small models with random weights (memory and time) on two cores of
a CPU. The command is

```sh
zotune bench run --scale cpu --jobs 2
```

An entry is the mean over seeds ± its standard error. Below it stands the paper's number with the model that it belongs
to. Models, rows and steps differ from the paper's, so the order of methods can be compared and their levels cannot;
each table says more. A claim of the paper *holds* or *does not hold* on this model if the 95 % interval of its
comparison lies on one side of the claimed difference; otherwise it *cannot be told*. Intervals cover evaluation rows
and seeds.
[How the benchmark works](running.md). `zotune bench report --scale cpu` writes the same as a page with figures.
""".strip()


def results_page() -> str:
    """The Markdown page of all recorded results."""
    sections = [section for name in names() if (section := _section(name)) is not None]
    return markdown_page(sections, "Results", _INTRODUCTION)


def _section(name: str) -> Section | None:
    stem, experiment = find(name)
    if "cpu" not in experiment.scale:
        return None
    return make_section(stem, experiment, [_recorded(spec) for spec in cells(stem, experiment, "cpu")])


def _recorded(spec: CellSpec) -> Cell:
    """The recorded cell, also if its code has changed since; the page names the commits."""
    result = read_result(result_path(RESULTS, spec.scale, spec.experiment, spec.name))
    return Cell(dict(spec.coordinates), "missing" if result is None else result.status, result)


if __name__ == "__main__":
    print(results_page(), end="")
