"""`zotune bench report`: write a page on the results of a scale, and its tables and figures as files for papers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from zotune.bench.report.formats import comma_separated, latex, markdown
from zotune.bench.report.html import page
from zotune.bench.report.markdown import markdown_page
from zotune.bench.report.print_figures import figure_files
from zotune.bench.report.sections import Section, read_section
from zotune.bench.spec.resolve import names
from zotune.bench.spec.schema import CellSpec
from zotune.bench.spec.vocabulary import Scale
from zotune.llm.output.locked_folder import LockedFolder

PAGE = "index.html"


def _unchanged(spec: CellSpec) -> CellSpec:
    return spec


def report(
    results: Path,
    scale: Scale,
    output: Path,
    experiments: Sequence[str] = (),
    run_as: Callable[[CellSpec], CellSpec] = _unchanged,
) -> list[Path]:
    """Write the report on a scale.

    Args:
        results: folder of the results.
        scale: the scale to report on.
        output: folder to write: `index.html`, `report.md`, `tables/NAME.md`, `.csv`, `.tex`, `figures/NAME-….pdf`,
            `.svg`.
        experiments: names of experiments, or paths of TOML files; by default all experiments.
        run_as: maps a cell of an experiment to the cell that was run, for instance with another source of data.

    Returns:
        The paths of the written files, the page first.

    Raises:
        UsageError: an experiment is unknown, a result cannot be read, or a folder cannot be written.
    """
    sections = [s for name in experiments or names() if (s := read_section(name, results, scale, run_as)) is not None]
    # Links lead from the page's folder to the results, so that both can be moved together.
    to_results = Path(os.path.relpath(results, output)).as_posix()
    files = [(output / place, content) for place, content in (*_page(sections, scale, to_results), *_parts(sections))]
    folders = list(dict.fromkeys(path.parent for path, _ in files))
    for folder in folders:
        _write(folder, {path.name: content for path, content in files if path.parent == folder})
    return [path for path, _ in files]


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, all at once; a file of the user's that has one of their names is renamed."""
    with LockedFolder(folder) as locked, locked.staged() as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)


def _parts(sections: Sequence[Section]) -> Iterator[tuple[str, bytes]]:
    yield from _tables(sections)
    yield from _figures(sections)


def _page(sections: Sequence[Section], scale: str, results: str) -> Iterator[tuple[str, bytes]]:
    yield PAGE, page(sections, scale, results).encode()
    yield "report.md", markdown_page(sections, f"The benchmark at scale {scale}", results=results).encode()


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
            for ending, content in figure_files(figure).items():
                yield f"figures/{figure.name}.{ending}", content
