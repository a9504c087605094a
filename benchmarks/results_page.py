"""docs/benchmark/results.md, made from the results in benchmarks/results/bench/cpu; a test holds the page to them.

python benchmarks/results_page.py > docs/benchmark/results.md
"""

from __future__ import annotations

from pathlib import Path

from zotune.bench.report.markdown import markdown_page
from zotune.bench.report.sections import Section, assembled
from zotune.bench.results.records import read_result, result_path
from zotune.bench.results.tables import Cell
from zotune.bench.spec.experiments import CellSpec, cells, find, names

RESULTS = Path(__file__).parent / "results" / "bench"
_INTRODUCTION = """
These tables were computed with SmolLM2-135M (accuracies) and small models with random weights (memory and time) on two
cores of a CPU:

```sh
zotune bench run --scale cpu --jobs 2
```

An entry is the mean over seeds ± its standard error. Below it stands the paper's number in the same place, with the model
that it belongs to. Models, rows and steps differ from the paper's, so compare the order of methods, not their levels; each
table says more. A claim of the paper *holds* or *does not hold* on this model if the 95 % interval of the compared quantity
lies on one side of the line that the claim draws; otherwise it *cannot be told*. Intervals cover evaluation rows and seeds.
[Running the benchmark](running.md) describes the method. `zotune bench report --scale cpu` writes the same tables with
figures.
""".strip()


def results_page() -> str:
    """The page on what there is."""
    found = [section for name in names() if (section := _section(name)) is not None]
    return markdown_page(found, "Results", _INTRODUCTION)


def _section(name: str) -> Section | None:
    stem, experiment = find(name)
    if "cpu" not in experiment.scale:
        return None
    return assembled(stem, experiment, [_recorded(spec) for spec in cells(stem, experiment, "cpu")])


def _recorded(spec: CellSpec) -> Cell:
    """The cell as it was recorded, by whichever code: the page names the commits."""
    found = read_result(result_path(RESULTS, spec.scale, spec.experiment, spec.name))
    return Cell(dict(spec.coordinates), "missing" if found is None else found.status, found)


if __name__ == "__main__":
    print(results_page(), end="")
