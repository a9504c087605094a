"""Make the samples of `data/`: rows of each task's public splits, chosen as `zotune train` chooses them.

    python data/make_samples.py FOLDER

FOLDER holds a folder a task with the public splits, `train.jsonl.gz` and `validation.jsonl.gz`, in their order.
`numpy.random.RandomState(0).permutation` of the training split gives `train` and, after it, `heldout`; the same of
the evaluation split gives `validation`, at most 1,000 rows. Where there are too few training rows for the task's
sizes, three quarters of them are to train on. SST-2's sample is older and kept as it is, but for `unused`: training
rows behind the held-out ones, to evaluate on.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from zotune.llm.data.readers import read_rows
from zotune.llm.tasks import TASKS
from zotune.llm.tasks.task import Task

REPOSITORY = Path(__file__).parent
PACKAGE = REPOSITORY.parent / "src" / "zotune" / "llm" / "tasks" / "data"
# Their licences let them be part of the package.
PACKAGED = ("copa", "winogrande")
# Further rows to evaluate on, by task.
UNUSED = {"sst2": 5_000}
WHAT = {
    "train": "to train on",
    "heldout": "held out of the training rows: to choose hyper-parameters on",
    "validation": "to report on",
}


def permuted(path: Path) -> list[dict[str, Any]]:
    """The rows of a split in their new order; none where there is no file."""
    rows = list(read_rows(path)) if path.is_file() else []
    return [rows[i] for i in np.random.RandomState(0).permutation(len(rows))]


def chosen(task: Task, source: Path) -> dict[str, list[dict[str, Any]]]:
    """The sample's parts."""
    train = permuted(source / "train.jsonl.gz")
    enough = len(train) >= task.num_train + task.num_dev
    cut = task.num_train if enough else len(train) * 3 // 4
    last = cut + task.num_dev if enough else len(train)
    validation = permuted(source / "validation.jsonl.gz")[: task.num_eval]
    return {"train": train[:cut], "heldout": train[cut:last], "validation": validation}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, gzipped without a time stamp, so that the same rows are the same bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def readme(task: Task, parts: dict[str, list[dict[str, Any]]]) -> str:
    """What the sample is, where it is from and on what terms."""
    lines = [f"| `{name}.jsonl.gz` | {len(rows):,} | {WHAT[name]} |" for name, rows in parts.items() if rows]
    fields = ", ".join(f"`{column}`" for column in next(iter(parts["validation"])))
    table = "\n".join(["| file | rows | what |", "|---|--:|---|", *lines])
    return f"""# {task.name}: {task.description}

{table}

Fields: {fields}. Texts are as in the source.

- Source: {task.source}; {task.size[0]:,} public training and {task.size[1]:,} evaluation rows.
- Licence: {task.licence}. The rows are here so that examples and tests run without a network.
- Chosen by `data/make_samples.py`: `numpy.random.RandomState(0).permutation` of each split. {task.note}
""".replace(" \n", "\n")


def main() -> None:
    """Make every sample but SST-2's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, help="the public splits, a folder a task")
    folder: Path = parser.parse_args().folder
    for name, task in TASKS.items():
        if name in UNUSED:
            first = task.num_train + task.num_dev
            unused = permuted(folder / name / "train.jsonl.gz")[first : first + UNUSED[name]]
            write(REPOSITORY / name / "unused.jsonl.gz", unused)
        if name == "sst2":
            continue
        target = (PACKAGE if name in PACKAGED else REPOSITORY) / name
        target.mkdir(parents=True, exist_ok=True)
        parts = chosen(task, folder / name)
        for part, rows in parts.items():
            if rows:
                write(target / f"{part}.jsonl.gz", rows)
        (target / "README.md").write_text(readme(task, parts), encoding="utf-8")


if __name__ == "__main__":
    main()
