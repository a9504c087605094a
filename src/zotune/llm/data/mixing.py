"""Mixing training files by weights: how often a pass over the rows reads each of them.

The shares of the files are those of their weights, and every row is read at least once a pass, so rows of files with
too few for their share are repeated. The rows that are repeated once more than others are drawn by a seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zotune.errors import UsageError

# Rows of a pass at most, by how many there are: weights that ask for more are a mistake.
_MOST_TIMES = 100


def mixed(sizes: Sequence[int], weights: Sequence[float], seed: int) -> list[int]:
    """Return the indices of the rows of one pass; those of the files follow each other in the order of the files.

    Args:
        sizes: the number of rows of each file.
        weights: how often a file's rows are read in relation to those of the others; > 0.
        seed: decides which rows of a file are repeated once more than its others.

    Raises:
        UsageError: a file has no row, or a pass would read many times as many rows as there are.

    >>> mixed([4, 2], [1, 1], seed=0), mixed([2, 3], [2, 1], seed=0)
    ([0, 1, 2, 3, 4, 5, 4, 5], [0, 1, 0, 1, 0, 1, 2, 3, 4])
    """
    if not all(sizes):
        raise UsageError(
            f"training file {list(sizes).index(0) + 1} of {len(sizes)} has no row to train on, so it cannot be mixed "
            "with the others. Give it more rows, or hold out fewer with --num-dev."
        )
    scale = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    counts = [max(size, round(scale * weight)) for size, weight in zip(sizes, weights, strict=True)]
    if sum(counts) > _MOST_TIMES * sum(sizes):
        raise UsageError(
            f"with the weights {', '.join(f'{weight:g}' for weight in weights)} a pass would read {sum(counts):,} rows "
            f"of {sum(sizes):,}, so some of them very often. Give weights nearer to the numbers of rows: "
            f"{', '.join(map(str, sizes))}."
        )
    indices: list[int] = []
    first = 0
    for size, count, number in zip(sizes, counts, range(len(sizes)), strict=True):
        once_more = np.random.RandomState([seed % 2**32, number]).permutation(size)[: count % size]
        indices += [first + i for i in [*range(size)] * (count // size)] + sorted(first + int(i) for i in once_more)
        first += size
    return indices
