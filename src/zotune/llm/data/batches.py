"""The batches of a run: passes over the training rows, each in a new random order drawn by the seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from zotune.llm.config.run import TrainConfig

Row = TypeVar("Row")


def batches(rows: Sequence[Row], config: TrainConfig) -> Iterator[list[Row]]:
    """Yield the rows of each step."""
    return ([rows[i] for i in indices] for indices in orders(len(rows), config))


def orders(num_rows: int, config: TrainConfig) -> Iterator[list[int]]:
    """Yield the indices of the rows of each step."""
    generator = torch.Generator().manual_seed(config.seed)
    size = config.rows_a_step
    queue, at = torch.empty(0, dtype=torch.int64), 0
    for _ in range(config.max_steps):
        while len(queue) < at + size:
            queue, at = torch.cat([queue[at:], torch.randperm(num_rows, generator=generator)]), 0
        yield queue[at : at + size].tolist()
        at += size
