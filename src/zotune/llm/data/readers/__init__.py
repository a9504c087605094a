"""Reading rows: JSON, CSV, TSV and text files, Parquet, folders of `save_to_disk`, and data sets of the Hub.

Each row carries its place, so that error messages name file and line. `read_located_rows` chooses the reader; there is
one module for each kind of file, and `located` defines a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from zotune.errors import UsageError
from zotune.llm.data.readers.data_sets import HUB as HUB
from zotune.llm.data.readers.data_sets import class_names as class_names
from zotune.llm.data.readers.data_sets import hub_rows as hub_rows
from zotune.llm.data.readers.data_sets import is_saved, read_hub, read_saved
from zotune.llm.data.readers.delimited import read_delimited
from zotune.llm.data.readers.documents import read_document
from zotune.llm.data.readers.json_files import read_json_file
from zotune.llm.data.readers.located import ClassNumber as ClassNumber
from zotune.llm.data.readers.located import LocatedRow as LocatedRow
from zotune.llm.data.readers.located import Row as Row
from zotune.llm.data.readers.parquet import read_parquet
from zotune.llm.data.readers.text_files import read_text_file

TABLES = (".csv", ".tsv")
"""The extensions of tables of text."""


def read_located_rows(source: Path, split: str = "train", delimiter: str | None = None) -> Iterator[LocatedRow]:
    """Yield the rows of a file or folder, or of a data set of the Hub.

    Args:
        source: the file, the folder of `save_to_disk`, or the name of the data set: `hub:ORG/NAME`,
            `hub:ORG/NAME/CONFIGURATION:SPLIT`.
        split: the split to read if the source has several and names none.
        delimiter: the delimiter of a CSV file; None: it is found.

    Raises:
        UsageError: the source does not exist, is of an unknown kind, or is malformed; the message names file and line.
    """
    if str(source).startswith(HUB):
        return read_hub(str(source).removeprefix(HUB), split)
    if is_saved(source):
        return read_saved(source, split)
    if not source.is_file():
        raise UsageError(_no_file(source))
    check_fetched(source)
    kind = kind_of(source)
    if kind in (".jsonl", ".json"):
        return read_text_file(source, read_json_file)
    if kind in TABLES:
        return read_text_file(source, partial(read_delimited, delimiter=delimiter))
    if kind in (".txt", ".md"):
        return read_text_file(source, read_document)
    if source.suffix.lower() == ".parquet":
        return read_parquet(source)
    raise UsageError(
        f"{source}: the extension must be .jsonl or .json, .csv or .tsv, .txt or .md, each also with .gz, or "
        f".parquet; got "
        f"{kind!r}. A folder must be one of save_to_disk of datasets."
    )


def kind_of(source: Path) -> str:
    """Return the extension of a file, without that of its compression.

    >>> kind_of(Path("rows.jsonl.gz")), kind_of(Path("rows.csv"))
    ('.jsonl', '.csv')
    """
    return (source.with_suffix("").suffix if source.suffix == ".gz" else source.suffix).lower()


def _no_file(source: Path) -> str:
    if source.is_dir():
        return (
            f"{source} is a folder, and not one of save_to_disk of datasets; name a file in it, or save the data set "
            "with save_to_disk."
        )
    return f"there is no file {str(source)!r}; check the path."


def check_fetched(path: Path) -> None:
    """Check that a file is itself there, and not the pointer that git-lfs leaves in its place.

    Raises:
        UsageError: it is a pointer.
    """
    with suppress(OSError), path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise UsageError(
                f"{path} is a pointer of git-lfs and not the file itself. Fetch the file with `git lfs pull`."
            )


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of `read_located_rows` without their places."""
    return (row.columns for row in read_located_rows(path))
