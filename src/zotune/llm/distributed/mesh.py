"""The mesh of a run's processes: which of them share the micro-batches of a step, and which its directions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from torch import nn

from zotune.errors import UsageError
from zotune.estimate.mesh import ALONE_MESH, Counter, Mesh
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.step import extents
from zotune.messages import Lossy, say
from zotune.model import shards
from zotune.system.processes import Processes, joined

_START = "torchrun --nproc-per-node N -m zotune …"


@contextmanager
def together(timeout: float) -> Iterator[Processes]:
    """Within this context the processes that torchrun started are connected, and only the first one speaks.

    Raises:
        UsageError: they cannot meet.
    """
    with joined(timeout) as processes:
        if processes.is_first:
            yield processes
            return
        silence: Any = Lossy(None)
        with redirect_stderr(silence):
            yield processes


def mesh_of_shards(model: nn.Module, processes: Processes, counter: Counter) -> Mesh | None:
    """Return the mesh of processes that a model lies on, which run every pass together; None if each holds it all."""
    return None if shards.mesh_of(model) is None else Mesh(processes, counter=counter, is_sharded=True)


def mesh_of(config: TrainConfig, processes: Processes, counter: Counter, model: nn.Module) -> Mesh:
    """Return the mesh that a run's options ask for, or one in which every process has something to do.

    Args:
        config: the options of the run.
        processes: those of the run.
        counter: counts the forward passes.
        model: what is tuned; it may lie on all of the processes.

    Raises:
        UsageError: the mesh does not have as many processes as there are, or some would have nothing to do.
    """
    if (found := mesh_of_shards(model, processes, counter)) is not None:
        say(f"the model lies in shards on {processes.size} processes, which run every pass together")
        return found
    size, parts, queries = processes.size, config.gradient_accumulation_steps, _num_shares(config)
    if config.parallel is not None:
        asked = extents(config.parallel)
        query, data = asked["query"], asked["data"]
        if query * data != size:
            raise UsageError(
                f"parallel: {config.parallel} is a mesh of {query * data} processes, but "
                f"{'there is one' if size == 1 else f'there are {size}'}. Start {query * data}: "
                f"{_START.replace('N', str(query * data))}"
            )
    else:
        data = max(d for d in range(1, size + 1) if size % d == 0 and d <= max(parts, 1))
        query = size // data
    if size == 1:
        return ALONE_MESH
    if data > parts or query > queries:
        raise UsageError(_idle(config, size, query, data, queries))
    mesh = Mesh(processes, query, data, counter)
    shares = [f"{data} share the {parts} micro-batches of a step"] if data > 1 else []
    shares += [f"{query} share its {queries} directions"] if query > 1 else []
    say(f"{size} processes: {', '.join(shares)}")
    return mesh


def _num_shares(config: TrainConfig) -> int:
    """Return how many processes may share the directions of a step."""
    if config.method in FIRST_ORDER or config.blocks is not None:
        return 1  # the probes of blocks share activations
    return config.num_queries


def _idle(config: TrainConfig, size: int, query: int, data: int, queries: int) -> str:
    rows, parts = config.rows_a_step, config.gradient_accumulation_steps
    smaller = next((b for b in range(rows // max(size, 1), 0, -1) if rows % b == 0 and rows // b >= size), None)
    cut = (
        f"--per-device-train-batch-size {smaller} --gradient-accumulation-steps {rows // smaller} cuts the same {rows} "
        "rows a step into enough"
        if smaller
        else f"--gradient-accumulation-steps {size} reads {size * config.per_device_train_batch_size} rows a step"
    )
    directions = f"{queries} direction{'s' * (queries > 1)} that can be shared"
    return (
        f"some of the {size} processes would have nothing to do: a step has {parts} micro-batch{'es' * (parts > 1)} "
        f"(gradient_accumulation_steps) and {directions}, and the mesh is query={query},data={data}. {cut}; or start "
        "fewer processes."
    )
