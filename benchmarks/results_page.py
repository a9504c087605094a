"""Write docs/benchmark/results.md from the results in benchmarks/results/bench/cpu; a test holds the page to it.

python benchmarks/results_page.py > docs/benchmark/results.md
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from zotune.bench.report.markdown import markdown_page
from zotune.bench.report.sections import Section, make_section
from zotune.bench.results.cells import Cell
from zotune.bench.results.records import read_result, result_path
from zotune.bench.spec.resolve import cells, find, names
from zotune.bench.spec.schema import CellSpec

RESULTS = Path(__file__).parent / "results" / "bench"
# From the page's folder.
_TO_RESULTS = "../../benchmarks/results/bench"
_INTRODUCTION = """
These are results of SmolLM2-135M (accuracy) and of small models with random weights (memory and time) on two cores of
a CPU. The command is

```sh
zotune bench run --scale cpu --jobs 2
```

An entry is the mean over seeds ± its standard error. Below it stands the paper's number with the model that it belongs
to. Models, rows and steps differ from the paper's, so the order of methods can be compared and their levels cannot;
each table says more. A claim of the paper *holds* or *does not hold* on this model if the 95 % interval of its
comparison lies on one side of the claimed difference; otherwise it *cannot be told*. A claim about accuracy counts only
where some method is above the untuned model and the majority class beyond noise. Text in “ ” is the paper's. Links lead
to the results that a verdict compares.
[How the benchmark works](running.md). `zotune bench report --scale cpu` writes the same as a page with figures.
""".strip()
_STALE = """
**{stale} of {cells} results are stale:** they were computed by older code than this page's. The command above computes
them anew.
""".strip()


def results_page(stale: int) -> str:
    """The Markdown page of all recorded results, with a banner if some are stale."""
    sections = [section for name in names() if (section := _section(name)) is not None]
    num_cells = sum(len(section.cells) for section in sections)
    banner = f"\n\n{_STALE.format(stale=stale, cells=num_cells)}" if stale else ""
    return markdown_page(sections, "Results", _INTRODUCTION + banner, results=_TO_RESULTS)


def num_stale() -> int:
    """The number of recorded results whose code, options or libraries have changed since."""
    from zotune.bench.run.runner import state_of

    return sum(state_of(RESULTS, spec) == "stale" for spec in _specs())


def _specs() -> Iterator[CellSpec]:
    for name in names():
        stem, experiment = find(name)
        if "cpu" in experiment.scale:
            yield from cells(stem, experiment, "cpu")


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
    print(results_page(num_stale()), end="")
