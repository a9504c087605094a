"""What N processes make of a step's time, and what they exchange: `python benchmarks/scaling.py`.

Two (or four) processes of one thread each, on this machine. In turn, within the same processes: a step of which the
first process evaluates all micro-batches while the others wait, and a step whose micro-batches all share. The ratio is
that of the median times over the ideal, 1/N. Each micro-batch has 16 rows of 64 tokens; the built-in model, float32.
The bytes are those of the numbers that a process sends in a step, counted where they are sent.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import zotune as zo
from zotune.estimate.objective import Batched, Closure
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.collator import collate
from zotune.llm.data.tokenization import Candidate, Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import load
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.output.environment import environment
from zotune.llm.scoring.objectives import CLASSIFICATION, mean_loss
from zotune.system.malloc import tune_malloc
from zotune.system.processes import joined

OUTPUT = Path(__file__).parent / "results" / "scaling.json"
ROWS, TOKENS = 16, 64
TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"tuning": "lora", "lora_target_modules": ["q_proj", "v_proj"]},
    "full": {"tuning": "full"},
}


def closures_of(lm: LanguageModel, number: int) -> list[Closure]:
    """Return closures of micro-batches of random rows with two candidates of one token each."""
    generator = torch.Generator().manual_seed(0)
    found: list[Closure] = []
    for _ in range(number):
        ids = torch.randint(0, lm.vocabulary, (ROWS, TOKENS), generator=generator).tolist()
        rows = [
            Encoded((tuple(row),), tuple(Candidate(0, (TOKENS - 1,), (t,)) for t in (5, 6)), label=0) for row in ids
        ]
        batch = collate(rows, lm.pad_token_id, lm.device)
        found.append(Batched(lambda copies, b=batch, r=rows: mean_loss(CLASSIFICATION, lm.score(b), b, r)))
    return found


def measured(tuning: str, rounds: int) -> dict[str, Any]:
    """Measure in the processes that are there; the result counts in the first one."""
    with joined(600) as processes:
        config = TrainConfig(model="smollm2-135m", task="sst2", dtype="float32", device="cpu", **TUNINGS[tuning])
        lm = load(config)
        prepare_tuning(lm, config)
        optimizer = zo.zo_sgd(lm.module, lr=1e-7, mu=1e-3)
        mesh = zo.Mesh(processes, data=processes.size)
        closures = closures_of(lm, processes.size)
        seconds: dict[str, list[float]] = {"alone": [], "shared": []}
        sent = 0
        gather = dist.all_gather

        def counted(found: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            sent += tensor.nbytes
            return gather(found, tensor, *args, **kwargs)

        dist.all_gather = counted  # type: ignore[assignment]
        for number in range(rounds + 1):
            for name in seconds:
                # The others sleep in it while the first process works.
                dist.barrier()
                start, sent = time.perf_counter(), 0
                if name == "shared":
                    optimizer.step(zo.accumulate(closures, mesh=mesh))
                elif processes.is_first:
                    optimizer.step(zo.accumulate(closures))
                if number:
                    seconds[name].append(time.perf_counter() - start)
        alone, shared = (statistics.median(seconds[name]) for name in ("alone", "shared"))
        return {
            "tuning": tuning,
            "processes": processes.size,
            "seconds_alone": alone,
            "seconds_shared": shared,
            "ratio_to_ideal": alone / (processes.size * shared),
            "bytes_sent_by_a_process": sent,
            "bytes_allowed": 64 * 2 * processes.size,
        }


def _work(results: Any, rank: int, size: int, port: int, tuning: str, rounds: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    tune_malloc()
    found = measured(tuning, rounds)
    if rank == 0:
        results.put(found)


def run(size: int, tuning: str, rounds: int) -> dict[str, Any]:
    """Measure with so many processes."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    workers = [context.Process(target=_work, args=(results, r, size, port, tuning, rounds)) for r in range(size)]
    for worker in workers:
        worker.start()
    found: dict[str, Any] = results.get()
    for worker in workers:
        worker.join()
    return found


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", nargs="+", type=int, default=[2])
    parser.add_argument("--tunings", nargs="+", choices=TUNINGS, default=list(TUNINGS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    runs = [run(size, tuning, args.rounds) for size in args.processes for tuning in args.tunings]
    record = {"rows": ROWS, "tokens": TOKENS, "rounds": args.rounds, "environment": environment(), "runs": runs}
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(runs, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
