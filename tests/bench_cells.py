"""What the benchmark's tests share: an executor in this process, one that makes up what jobs find, a small table."""

import hashlib
import json
import threading
from pathlib import Path

from zotune.bench.run.jobs import Outcome
from zotune.bench.run.runner import Runner
from zotune.bench.spec.resolve import cells
from zotune.bench.spec.schema import Experiment
from zotune.errors import ZotuneError
from zotune.llm.config.schema import validate

# Made-up forward-equivalents of a step.
EQUIVALENTS = {"zo_sgd_cons": 5, "fo_sgd": 3, "fo_adam": 3}


class Silent:
    """A display that keeps what it is told."""

    def __init__(self):
        self.said = []

    def began(self, spec):
        self.said.append((spec.path, "began"))

    def ended(self, spec, state, message):
        self.said.append((spec.path, state))


def here(job, folder):
    """Do a job in this process."""
    from zotune.bench.run.worker import do

    try:
        line = {"does": job.does, "options": job.options, "key": job.key, "folder": str(folder)}
        return Outcome("done", found=do(line))
    except ZotuneError as error:
        return Outcome("failed", str(error))


def made_up(job, folder=None):
    """What a job might have found, a function of its options; no model is run."""
    number = int(hashlib.sha256(json.dumps(job.options, sort_keys=True).encode()).hexdigest()[:6], 16) / 2**24
    score = {"metric": "accuracy", "value": number, "num_examples": 10, "loss": 1 - number}
    if job.does == "evaluate":
        return Outcome("done", found={"scores": {"zero_shot": score}, "environment": {}})
    steps = job.options["max_steps"]
    run = {"seed": job.options["seed"], "dev": score, "test": score, "num_steps": steps, "seconds": 0.1 * steps}
    measured = {"seconds_per_step": 0.1, "seconds_before": 1.0, "step_bytes": 2**29, "loading_bytes": 2**28}
    # What a step takes is up to the methods; here it follows from their names alone.
    values = {"equivalents_per_step": EQUIVALENTS.get(job.options.get("method", "zo_sgd"), 2)}
    run |= {"peak_memory": 2**30, "measured": measured, "values": values}
    return Outcome("done", found={"run": run, "environment": {}})


def small_table(**changes):
    """An experiment of two cells with a search of two points and two seeds each: 10 runs and a zero-shot."""
    plain = {
        "title": "small",
        "question": "?",
        "layout": {"rows": ["method"]},
        "comparable": "nothing",
        "axes": {"method": ["zo_sgd", "zo_adam"]},
        "seeds": [0, 1],
        "options": {"task": "copa", "model": "random:opt-tiny", "tuning": "lora"},
        "search": {"learning_rate": [1e-3, 1e-2]},
        "scale": {"smoke": {"search": {"learning_rate": [1e-3, 1e-2]}, "seeds": [0, 1]}},
    }
    return validate(Experiment, {**plain, **changes}, "test")


def small_cells(**changes):
    return list(cells("small", small_table(**changes), "smoke"))


def run_cells(specs, results, *executors, stop=None, **options):
    """Run cells with an executor for each slot; their states."""
    runner = Runner(Path(results), executors or (made_up,), stop or threading.Event(), Silent(), **options)
    return runner.run(specs)


def contents(results):
    """Every result file as plain values, by path below the folder."""
    files = sorted(p for p in Path(results).rglob("*.json") if ".jobs" not in p.parts)
    return {str(p.relative_to(results)): json.loads(p.read_text(encoding="utf-8")) for p in files}
