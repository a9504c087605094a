"""What is run, on which folders, and what must be there at the end: every file, and no other."""

import json
import os
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache

import peft
import yaml
from pytest import MonkeyPatch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import LlamaForCausalLM

from bench_cells import here as in_this_process
from faults import process, tracing
from zotune.bench.report.run_html import write_run_page
from zotune.bench.run import processes, worker
from zotune.llm.ledger.merge import find_fine_tune
from zotune.llm.output.manifest import digest_of
from zotune.llm.training.checkpoint import load
from zotune.llm.training.evaluation import evaluate
from zotune.llm.training.resume import CHECKPOINT
from zotune.llm.training.train import train

# What children use, imported before they are forked.
PRELOADED = (peft.LoraConfig, yaml.safe_load, LlamaForCausalLM, train, evaluate, write_run_page)
PRELOADED += (worker.do, find_fine_tune)

ROWS = [
    {"text": f"{a} {b}", "label": "yes" if a in ("warm", "fine") else "no"}
    for a in ("warm", "dull", "fine", "bad")
    for b in ("film", "story of a man", "plot , and then it ends", "acting")
]
STEPS = 8
TRAIN = ("train", "--model", "random:llama-tiny", "--train-file", "rows.jsonl", "--output-dir", "out", "--num-dev", 3)
TRAIN += ("--device", "cpu", "--per-device-train-batch-size", 4, "--learning-rate", 0.01, "--logging-steps", 2)
TRAIN += ("--seed", 5, "--max-steps", STEPS)
LORA = ("--tuning", "lora")
HYBRID = ("--hybrid-layers", 1, "--hybrid-tied", "zeroth_order", "--hybrid-method", "fo_adam")
RUNS = {
    "zo_sgd, lora": (*LORA, "--eval-steps", 3),
    "zo_sgd, bfloat16": ("--dtype", "bfloat16", "--lr-scheduler-type", "linear"),
    "zo_adam, checkpoints": ("--method", "zo_adam", *LORA, "--save-steps", 2),
    "zo_sgd_mmt, masks, checkpoints": ("--method", "zo_sgd_mmt", "--sparsity", 0.3, "--save-steps", 3),
    "blocks, queries": ("--blocks", "layer", "--block-order", "sequential", "--num-queries", 2, "--max-steps", 4),
    "forward_grad": ("--method", "forward_grad", *LORA, "--max-steps", 4),
    "prompt": ("--tuning", "prompt"),
    "best model": (*LORA, "--eval-steps", 2, "--load-best-model-at-end"),
    "fo_sgd, full": ("--method", "fo_sgd", "--save-steps", 3),
    "fo_adam, checkpoints": ("--method", "fo_adam", *LORA, "--save-steps", 2),
    "hybrid, checkpoints": (*HYBRID, "--save-steps", 3),
}
TABLE = """
title = "small"
question = "?"
comparable = "nothing"
seeds = [0]
[layout]
rows = ["method"]
[axes]
method = ["zo_sgd", "zo_adam"]
[options]
task = "copa"
model = "random:opt-tiny"
tuning = "lora"
max_steps = 2
num_train = 4
num_dev = 4
num_eval = 4
per_device_train_batch_size = 2
learning_rate = 0.01
[scale.smoke]
seeds = [0]
"""


@dataclass(frozen=True)
class Command:
    """A command line, in a folder that holds some finished runs.

    Attributes:
        args: the arguments; files and folders are relative.
        again: what is added when it is run again after a fault.
        needs: names of the finished runs that the folder holds.
    """

    args: tuple
    again: tuple = ()
    needs: tuple = ()


SOURCES = {
    "run": (*TRAIN, *LORA),
    "other": (*TRAIN, *LORA, "--seed", 6),
    "whole": TRAIN,
    "whole_too": (*TRAIN, "--seed", 6),
    "half": (*TRAIN, *LORA, "--max-steps", STEPS // 2),
    "first_order": (*TRAIN, *LORA, "--method", "fo_adam", "--save-steps", 2, "--max-steps", STEPS // 2),
}
TWO, WHOLES = ("run", "other"), ("whole", "whole_too")
COMMANDS = {name: Command((*TRAIN, *more), ("--resume",)) for name, more in RUNS.items()}
COMMANDS |= {
    "more steps": Command((*TRAIN, *LORA, "--output-dir", "half", "--resume"), (), ("half",)),
    "more first-order steps": Command(
        (*SOURCES["first_order"], "--max-steps", STEPS, "--output-dir", "first_order", "--resume"), (), ("first_order",)
    ),
    "a new run over an old one": Command(
        (*TRAIN, *LORA, "--output-dir", "run", "--seed", 7, "--overwrite-output-dir"), (), ("run",)
    ),
    "replay": Command(("ledger", "replay", "whole", "--output-dir", "out", "--step", 5), (), ("whole",)),
    "replay of an adapter": Command(("ledger", "replay", "run", "--output-dir", "out"), (), ("run",)),
    "export": Command(("ledger", "export", "run", "--output-dir", "out", "--merged"), (), ("run",)),
    "export in shards": Command(
        ("ledger", "export", "whole", "--output-dir", "out", "--max-shard-size", "50KB"), (), ("whole",)
    ),
    "merge": Command(("ledger", "merge", *TWO, "--output-dir", "out"), (), TWO),
    "mean": Command(("ledger", "merge", *WHOLES, "--average", "--output-dir", "out"), (), WHOLES),
    "undo": Command(("ledger", "undo", "run", "--to-step", 5), (), ("run",)),
    "undo, full": Command(("ledger", "undo", "whole", "--to-step", 0), (), ("whole",)),
    "eval": Command(("eval", "--model", "run", "--eval-file", "rows.jsonl", "--output-dir", "out"), (), ("run",)),
    "whole model": Command(("merge", "run", "--output-dir", "out"), (), ("run",)),
    "going on": Command((*TRAIN, "--model", "run", *LORA, "--output-dir", "out"), ("--resume",), ("run",)),
    "answers": Command(
        ("generate", "--model", "run", "--prompt", "a", "b", "--max-new-tokens", 3, "--output-file", "answers.jsonl"),
        (),
        ("run",),
    ),
    "bench": Command(("bench", "run", "small.toml", "--scale", "smoke", "--results", "out")),
}


class Place:
    """A folder in which commands are run, made anew for each trial with the finished runs that it needs."""

    def __init__(self, area):
        self.area, self.here, self.log = area, area / "here", area / "log"
        self.kept = area / "kept"
        self.kept.mkdir(exist_ok=True)

    def warm_up(self):
        """Run some commands in this process, so that its children find loaded what they use."""
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            for name in ("zo_sgd, lora", "bench"):
                self.empty()
                with MonkeyPatch.context() as patch:
                    patch.setattr(processes.Process, "__call__", lambda self, job, folder: in_this_process(job, folder))
                    assert process.cli.run([str(arg) for arg in COMMANDS[name].args]) == 0
            for args in ("eval --model run --eval-file rows.jsonl", "ledger export run --output-dir out --merged"):
                self.furnish(Command((), (), ("run",)))
                assert process.cli.run(args.split()) == 0

    def empty(self):
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir()
        (self.here / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS), encoding="utf-8")
        (self.here / "small.toml").write_text(TABLE, encoding="utf-8")
        os.chdir(self.here)

    def furnish(self, command):
        """Make the folder anew, with the runs that a command needs."""
        for name in command.needs:
            self.source(name)
        self.empty()
        for name in command.needs:
            shutil.copytree(self.kept / name, self.here / name)

    @cache  # noqa: B019 - a place lives as long as its process
    def source(self, name):
        """A finished run, made once."""
        self.empty()
        ended = process.run([*SOURCES[name], "--output-dir", name], self.log)
        assert ended.code == 0, ended.said
        shutil.copytree(self.here / name, self.kept / name)

    @cache  # noqa: B019
    def reference(self, name):
        """What a command leaves that nothing disturbs, and how many calls of it change files."""
        command = COMMANDS[name]
        self.furnish(command)
        ended = self.traced(command.args) if tracing.can_trace() else self.run(command.args)
        assert ended.code == 0, ended.said
        return self.snapshot(), max(ended.writes, 1)

    def run(self, args):
        return process.run(args, self.log, prepare)

    def traced(self, args, act=tracing.nothing):
        return tracing.traced(args, self.log, act, prepare)

    def snapshot(self):
        """Every file below the folder by its name, but for what passes: times, memory, pages drawn from them."""
        files = [path for path in sorted(self.here.rglob("*")) if not path.is_dir()]
        return {str(path.relative_to(self.here)): lasting(path) for path in files}


def prepare():
    """Let a child do the jobs of a benchmark itself: a process of their own would import everything again."""
    processes.Process.__call__ = lambda self, job, folder: in_this_process(job, folder)


PASSING = {"seconds", "peak_memory", "seconds_per_step", "seconds_before", "measured", "time"}


def lasting(path):
    """A file's content without what differs between two runs of the same command."""
    content = path.read_bytes()
    if path.name == "zotune-files.json":
        return manifest(json.loads(content), path.parent)
    if path.name == CHECKPOINT:
        return tree_map(lambda x: x.numpy().tobytes() if isinstance(x, Tensor) else x, without_passing(load(path)))
    if path.suffix == ".json" and path.name != "tokenizer.json":
        return without_passing(json.loads(content))
    if path.suffix == ".jsonl":
        return [without_passing(json.loads(line)) for line in content.splitlines()]
    if path.name == "README.md":
        return re.sub(rb"(?m)^\| (training time|peak memory).*", b"", content)
    return path.suffix if path.suffix == ".html" else content


def manifest(value, folder):
    """The names in a folder's manifest, and whether each digest is that of the file."""
    named = {name: digest for name, digest in value["files"].items() if digest}
    right = {name: (folder / name).exists() and digest_of(folder / name) == digest for name, digest in named.items()}
    return {**value, "files": dict.fromkeys(value["files"]) | right}


def without_passing(value):
    if isinstance(value, dict):
        return {k: without_passing(v) for k, v in value.items() if k not in PASSING}
    return [without_passing(v) for v in value] if isinstance(value, list) else value


def plan(count, chance):
    """The commands to try, each as often as the others."""
    names = list(COMMANDS)
    return [names[i % len(names)] for i in range(count)]


def differences(found, wanted):
    """The names of files that differ, in words; empty if none do."""
    lines = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    lines += [f"{name} is left over" for name in sorted(found.keys() - wanted.keys())]
    both = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    return "; ".join(lines + [f"{name} differs: {short(found[name], wanted[name])}" for name in both])


def short(one, other):
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [k for k in {**one, **other} if one.get(k) != other.get(k)]
        return f"{[(k, one.get(k), other.get(k)) for k in keys]}"[:300]
    return f"{one!r}"[:100] + " | " + f"{other!r}"[:100]
