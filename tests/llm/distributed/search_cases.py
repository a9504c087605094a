"""What each process of a test of searches does: short searches of the learning rate by the command and in Python."""

import os
from contextlib import contextmanager, suppress
from unittest.mock import patch

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

import many_cases
from zotune.llm import load, train
from zotune.llm.models.placement import sharded
from zotune.llm.training import best_model, find_rate
from zotune.llm.training.loop import Run
from zotune.model.shards import gathered
from zotune.system.processes import joined


@contextmanager
def short_searches(*, differ=False):
    """Within this context runs of two steps search, by two trials of a step; judgements may `differ` in processes."""
    judge, rank = Run.objective_on, int(os.environ.get("RANK", "0"))

    def judged(run, examples):
        return judge(run, examples) * (-1 if differ and rank else 1)

    few = {"MIN_STEPS": 1, "MAX_TRIALS": 2, "MAX_SHARE": 8}
    # Copies of the weights lie in files, where there is a folder.
    files = patch.object(best_model, "MAX_MEMORY", 0)
    with patch.multiple(find_rate, **few), patch.object(Run, "objective_on", judged), files:
        yield


def searched_runs(configs):
    """Runs by the command."""
    with short_searches(differ=True):
        return many_cases.train_runs(configs)


def searched_in_python(rows, way):
    """Runs of a loaded model that its owner has cut, if several processes run: with a search, and at the found rate.

    Of each the bits of the weights, the passes, the rate and the last loss.
    """
    found, rate = [], "auto"
    with joined(120) as processes:
        for _ in range(2):
            model, tokenizer = load("random:opt-tiny", device="cpu")
            if processes.size > 1:
                cut(model, way, processes.size)
            with short_searches():
                result = train(model, tokenizer, rows, learning_rate=rate, max_steps=2, tuning="full")
            last = result.log_history[-1]
            rate = last["learning_rate"]
            bits = many_cases.digest(gathered(dict(model.named_parameters())).values())
            found.append((bits, result.num_forwards, rate, last["loss"]))
    return found


def interrupted(rows):
    """A run of a model in shards that ends while FSDP2 holds gathered weights: whether the model has its slices then,
    and what it computes.
    """
    ids = torch.arange(8)[None]
    with joined(120) as processes, torch.no_grad():
        model, tokenizer = load("random:opt-tiny", device="cpu")
        before = model(ids).logits
        cut(model, "fsdp", processes.size)
        own = [*model.parameters()]
        with suppress(KeyboardInterrupt):
            train(model, tokenizer, rows, rows, eval_steps=1, max_steps=2, learning_rate=0.0, tuning="full",
                  callbacks=[EndsWhenEvaluated()])  # fmt: skip
        mine = [a is b for a, b in zip(model.parameters(), own, strict=True)]
        return EndsWhenEvaluated.has_ended, all(mine), torch.equal(model(ids).logits, before)


class EndsWhenEvaluated(TrainerCallback):
    """Ends a run in each of its processes, of which the first alone calls callbacks."""

    has_ended = False

    def on_evaluate(self, *args, **more):
        EndsWhenEvaluated.has_ended = True
        raise KeyboardInterrupt


def cut(model, way, size):
    """By FSDP2, which keeps what it has gathered of the outermost module, or by a plan."""
    if way == "tp":
        sharded.cut_by_plan(model)
        return
    for part in (*model.model.decoder.layers, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (size,)))
