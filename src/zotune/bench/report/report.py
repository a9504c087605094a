"""`zotune bench report`: a page of a scale's results, with tables and figures as files for papers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from zotune.bench.report.formats import comma_separated, latex, markdown
from zotune.bench.report.html import page
from zotune.bench.report.markdown import markdown_page
from zotune.bench.report.print_figures import pressed
from zotune.bench.report.sections import Section, section
from zotune.bench.results.records import Scale
from zotune.bench.spec.experiments import CellSpec, names

PAGE = "index.html"


def _as_is(spec: CellSpec) -> CellSpec:
    return spec


def report(
    results: Path,
    scale: Scale,
    output: Path,
    given: Sequence[str] = (),
    run_as: Callable[[CellSpec], CellSpec] = _as_is,
) -> list[Path]:
    """Write the report on a scale, of all experiments or those that are named; the files, the page first.

    Args:
        results: where the runner keeps them.
        scale: of which to report.
        output: a folder: `index.html`, `report.md`, `tables/NAME.md`, `.csv`, `.tex`, `figures/NAME-….pdf`, `.svg`.
        given: names of experiments, or paths of TOML files.
        run_as: what a cell was run as, where that is not what its file says.

    Raises:
        UsageError: an experiment is not known, or a result cannot be read.
    """
    found = [s for name in given or names() if (s := section(name, results, scale, run_as)) is not None]
    written = []
    for place, content in (*_page(found, scale), *_tables(found), *_figures(found)):
        path = output / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written.append(path)
    return written


def _page(sections: Sequence[Section], scale: str) -> Iterator[tuple[str, bytes]]:
    yield PAGE, page(sections, scale).encode()
    yield "report.md", markdown_page(sections, f"The benchmark at scale {scale}").encode()


def _tables(sections: Sequence[Section]) -> Iterator[tuple[str, bytes]]:
    for one in sections:
        if one.table.rows:
            place, title = f"tables/{one.name}", one.experiment.title
            yield f"{place}.md", f"# {title}\n\n{markdown(one.table)}\n".encode()
            yield f"{place}.csv", comma_separated(one.table).encode()
            yield f"{place}.tex", latex(one.table, title).encode()


def _figures(sections: Sequence[Section]) -> Iterator[tuple[str, bytes]]:
    for one in sections:
        for figure in one.figures:
            for ending, content in pressed(figure).items():
                yield f"figures/{figure.name}.{ending}", content
