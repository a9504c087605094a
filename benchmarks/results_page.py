"""docs/benchmark/results.md, made from the results in benchmarks/results/bench/cpu; a test holds the page to them.

python benchmarks/results_page.py > docs/benchmark/results.md
"""

from __future__ import annotations

from pathlib import Path

from zotune.bench.cells import read_result, result_path
from zotune.bench.experiments import CellSpec, cells, find, names
from zotune.bench.markdown_page import markdown_page
from zotune.bench.sections import Section, assembled
from zotune.bench.tables import Cell

RESULTS = Path(__file__).parent / "results" / "bench"
_INTRODUCTION = """
SmolLM2-135M (its accuracies) and small models with random weights (memory and time) on two cores of a CPU, by

```sh
zotune bench run --scale cpu --jobs 2
```

An entry is the mean over seeds ± its standard error; below it stands what the paper has in that place, of the model
that it names. Models, rows and steps are not the paper's, so what may be compared is the order of methods, not their
levels; each table says more. A claim of the paper *holds* or *does not hold* on this model where the 95 % interval of
what it compares lies on one side of the line that it draws; else it *cannot be told*. Intervals cover evaluation rows
and seeds. [How it works](running.md); the same with figures, as a page: `zotune bench report --scale cpu`.
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
