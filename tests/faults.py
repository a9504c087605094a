"""Runs that are killed, torn, flipped, starved of disk and started twice; after each the run goes on to the same bits.

    python tests/faults.py --count 200 --seed 0 --output benchmarks/results/faults.json

Each fault happens to a process of its own, forked from this one, which runs the command line. Then either
`--resume` must end with the files of the uninterrupted run (weights, ledger, metrics, results), or the
command must refuse with exit code 2 and the right message and change nothing.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import peft
import scipy.stats
import torch
import yaml
from transformers import LlamaForCausalLM

from zotune.cli import main as cli
from zotune.ledger import files, read
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.output import environment as machine
from zotune.llm.output import json_files
from zotune.llm.output import metrics_log as metrics
from zotune.llm.output import output_folder as output
from zotune.llm.training import checkpoint
from zotune.llm.training.train import train
from zotune.optim import zeroth_order

ROWS = [
    {"text": f"{a} {b}", "label": "yes" if a in ("warm", "fine") else "no"}
    for a in ("warm", "dull", "fine", "bad")
    for b in ("film", "story of a man", "plot , and then it ends", "acting")
]
RUNS = {
    "zo_sgd, lora": ["--tuning", "lora", "--eval-steps", 5],
    "zo_sgd, bfloat16": ["--dtype", "bfloat16", "--lr-scheduler-type", "linear"],
    "zo_adam, checkpoints": ["--method", "zo_adam", "--tuning", "lora", "--save-steps", 4],
    "zo_sgd_mmt, masks, checkpoints": ["--method", "zo_sgd_mmt", "--sparsity", 0.3, "--save-steps", 3],
    "blocks, queries": ["--blocks", "layer", "--block-order", "sequential", "--num-queries", 2],
    "fo_adam, checkpoints": ["--method", "fo_adam", "--tuning", "lora", "--save-steps", 4],
    "hybrid, checkpoints": [
        *("--hybrid-layers", 1, "--hybrid-tied", "zeroth_order", "--save-steps", 3, "--hybrid-method", "fo_adam")
    ],
}
STEPS = 16
# What children use, imported before they are forked.
_PRELOADED = (peft.LoraConfig, scipy.stats.norm, yaml.safe_load, LlamaForCausalLM, train)
PASSING = {"seconds", "peak_memory"}


def arguments(folder, out, name):
    """The command line of a short run."""
    plain = ["train", "--model", "random:llama-tiny", "--train-file", folder / "rows.jsonl", "--output-dir", out]
    plain += ["--max-steps", STEPS, "--num-dev", 3, "--device", "cpu", "--per-device-train-batch-size", 4]
    plain += ["--learning-rate", 0.01, "--logging-steps", 2, "--seed", 5]
    return [str(a) for a in [*plain, *RUNS[name]]]


def begin(args, log, prepare=lambda: None):
    """A child process that runs the command line; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(to, 1)
        os.dup2(to, 2)
        prepare()
        code = cli.run(args)
    finally:
        os._exit(code)


def end(pid):
    """A child's exit code; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die():
    """End this process as a power cut would, but for what the system has in its buffers."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying(owner, name, when, how=die):
    """Let the call number `when` of a function be the process's last."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            how(*args) if how is not die else die()
        return real(*args, **kwargs)

    setattr(owner, name, call)


def torn_write(chance):
    """Write some of the bytes, then die."""

    def write(file, content):
        os.pwrite(file, content[: chance.randrange(len(content) + 1)], os.lseek(file, 0, os.SEEK_CUR))
        die()

    return write


def torn_text(chance):
    """As `torn_write`, of a line of metrics."""

    def append(log, record):
        with log._path.open("a", encoding="utf-8") as file:
            text = metrics._text(record)
            file.write(text[: chance.randrange(len(text))])
        die()

    return append


POINTS = {
    "killed in a probe": lambda c: dying(LanguageModel, "score", c.randrange(1, 40)),
    "killed in an update": lambda c: dying(zeroth_order, "update_tensors_", c.randrange(1, STEPS + 1)),
    "killed in a ledger write": lambda c: dying(files, "_write_all", c.randrange(1, STEPS + 2), torn_write(c)),
    "killed in a log write": lambda c: dying(metrics.MetricsLog, "append", c.randrange(1, 8), torn_text(c)),
    "killed in a checkpoint": lambda c: dying(checkpoint, c.choice(["save_file", "sync"]), c.randrange(1, 5)),
    "killed saving the model": lambda c: dying(output, c.choice(["save_model_files", "write_json", "model_card"]), 1),
}


class Trial:
    """One folder in which one fault happens to one run."""

    def __init__(self, folder, name, chance, whole):
        self.folder, self.name, self.chance, self.whole = folder, name, chance, whole
        self.out, self.log, self.kills = folder / "out", folder / "log", 0
        shutil.rmtree(self.out, ignore_errors=True)
        self.args = arguments(folder, self.out, name)

    def run(self, *more, prepare=lambda: None):
        """The command line to its end; its exit code."""
        code = end(begin([*self.args, *more], self.log, prepare))
        self.note(code)
        return code

    def said(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def resume_is_whole(self):
        """Go on, and compare with the uninterrupted run."""
        code = self.run("--resume")
        assert code == 0, (code, self.said())
        assert snapshot(self.out) == self.whole, "the resumed run ended differently"

    def kill_at_random(self):
        """Kill the process after some time, or let it end."""
        pid = begin([*self.args, "--resume"], self.log)
        time.sleep(self.chance.uniform(0, 1.2))
        os.kill(pid, signal.SIGKILL)
        self.note(end(pid))

    def note(self, code):
        """Count an exit code that is a kill."""
        self.kills += code == -signal.SIGKILL


def snapshot(out):
    """All that must be the same: weights, records, metrics, results."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for found in (*(line.get("dev", {}) for line in lines), *(results[k] or {} for k in ("dev_before", "dev", "test"))):
        found.pop("seconds", None)
    results = {k: v for k, v in results.items() if k not in (*PASSING, "output_dir", "config")}
    (weights,) = out.glob("*model.safetensors")
    ledger = out / "ledger.zol"
    records = list(map(repr, read(ledger))) if ledger.exists() else None
    return weights.read_bytes(), records, [{k: v for k, v in x.items() if k not in PASSING} for x in lines], results


def killed_at_random(trial):
    """Killed at any time, some times over."""
    for _ in range(trial.chance.choice([1, 1, 2, 3])):
        trial.kill_at_random()
    trial.resume_is_whole()


def killed_at(point):
    """Killed within a certain piece of work."""

    def fault(trial):
        code = trial.run(prepare=lambda: POINTS[point](trial.chance))
        assert code in (0, -signal.SIGKILL), (code, trial.said())
        trial.resume_is_whole()

    return fault


def power_cut(trial):
    """Killed, and what was not synced is gone: any number of bytes at the end of the files that grow."""
    trial.run(
        prepare=lambda: POINTS[trial.chance.choice(["killed in a probe", "killed in a ledger write"])](trial.chance)
    )
    for name, least in (("ledger.zol", None), ("metrics.jsonl", 0)):
        path = trial.out / name
        if not path.exists():
            continue
        content = path.read_bytes()
        least = header_size(content) if least is None else least
        kept = content[: trial.chance.randrange(least, len(content) + 1)]
        # Some file systems leave zeros, or what was there before, where data did not reach the disk.
        tail = trial.chance.choice([b"", bytes(trial.chance.randrange(200)), trial.chance.randbytes(50)])
        path.write_bytes(kept + tail)
    (trial.out / "checkpoint.safetensors").unlink(missing_ok=True)
    trial.resume_is_whole()


def header_size(content):
    return 20 + int.from_bytes(content[12:16], "little")


def flipped(trial):
    """Some bits of the ledger flipped: refused with a message and nothing changed, or a damaged tail cut."""
    trial.run(prepare=lambda: POINTS["killed in a probe"](trial.chance))
    path = trial.out / "ledger.zol"
    if not path.exists():
        return trial.resume_is_whole()
    content = bytearray(path.read_bytes())
    for _ in range(trial.chance.choice([1, 1, 1, 5])):
        content[trial.chance.randrange(len(content))] ^= 1 << trial.chance.randrange(8)
    path.write_bytes(content)
    before = {p.name: p.read_bytes() for p in trial.out.iterdir()}
    code = trial.run("--resume")
    if code == 0:
        assert snapshot(trial.out) == trial.whole
        return None
    assert code == 2, (code, trial.said())
    assert re.search(r"damaged|is no ledger|format version|ends within its header", trial.said()), trial.said()
    assert {p.name: p.read_bytes() for p in trial.out.iterdir()} == before
    return None


def truncated_header(trial):
    """The ledger ends within its header: refused."""
    trial.run(prepare=lambda: POINTS["killed in a probe"](trial.chance))
    path = trial.out / "ledger.zol"
    if not path.exists():
        return trial.resume_is_whole()
    content = path.read_bytes()
    path.write_bytes(content[: trial.chance.randrange(header_size(content))])
    assert trial.run("--resume") == 2
    assert re.search(r"is no ledger|ends within its header", trial.said()), trial.said()
    return None


def full_disk(trial):
    """A small file system that fills up; after some room is made the run goes on."""
    size = trial.chance.randrange(8, 700)
    trial.out.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", trial.out], capture_output=True, check=False
    ).returncode
    try:
        limit = lambda: None if mounted else resource.setrlimit(resource.RLIMIT_FSIZE, (size << 10, size << 10))
        code = trial.run(prepare=limit)
        text = trial.said()
        assert code in (0, 1, 2), (code, text)
        assert code == 0 or re.search(r"No space left|File too large|MB free|cannot be written", text), text
        assert "Traceback" not in text, text
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", trial.out], check=True)
        trial.resume_is_whole()
    finally:
        if mounted:
            subprocess.run(["umount", trial.out], check=True)


def two_at_once(trial):
    """Two runs into one folder: one of them is refused, the other one ends as if alone."""
    pids = [begin([*trial.args, "--resume"], trial.folder / f"log{i}") for i in range(2)]
    codes = sorted(map(end, pids))
    texts = [(trial.folder / f"log{i}").read_text(encoding="utf-8") for i in range(2)]
    assert codes in ([0, 2], [0, 0]), (codes, texts)
    if codes == [0, 2]:
        assert any(re.search("another (run|process) is writing", text) for text in texts), texts
    assert snapshot(trial.out) == trial.whole


def interrupted(trial):
    """SIGTERM or SIGINT: the run saves, says so with its exit code, and goes on later."""
    number = trial.chance.choice([signal.SIGTERM, signal.SIGINT])
    when = trial.chance.randrange(2, 30)
    code = trial.run(prepare=lambda: dying(LanguageModel, "score", 8 + when, lambda *_: os.kill(os.getpid(), number)))
    assert code in (0, 128 + number, -number), (code, trial.said())
    trial.resume_is_whole()


def removed_folder(trial):
    """The folder is removed meanwhile: the run ends with a message."""

    def remove():
        dying(LanguageModel, "score", trial.chance.randrange(10, 40), lambda *_: shutil.rmtree(trial.out))
        files._SECONDS_BETWEEN_SYNCS = 0.0

    code = trial.run(prepare=remove)
    assert code in (0, 1), (code, trial.said())
    assert "Traceback" not in trial.said(), trial.said()
    trial.resume_is_whole()


FAULTS = {
    "killed at a random moment": killed_at_random,
    **{point: killed_at(point) for point in POINTS},
    "power cut": power_cut,
    "bits flipped": flipped,
    "header truncated": truncated_header,
    "disk full": full_disk,
    "two runs at once": two_at_once,
    "interrupted": interrupted,
    "folder removed": removed_folder,
}
# In full, kills are the most: 200 and more of them.
WEIGHTS = {**dict.fromkeys(POINTS, 3), "killed at a random moment": 10, "power cut": 3, "bits flipped": 3}


def inject(count, seed, folder):
    """`count` faults, one of each kind first; after each, how many of each kind were survived, and what failed."""
    chance = random.Random(seed)
    write_rows(folder)
    plan = [kind for kind in FAULTS for _ in range(WEIGHTS.get(kind, 1))]
    plan = [*FAULTS, *(chance.choice(plan) for _ in range(count))][:count]
    wholes, tried, survived, kills, failed = {}, Counter(), Counter(), 0, []
    for number, kind in enumerate(plan):
        name = chance.choice(list(RUNS))
        if name not in wholes:
            assert end(begin(arguments(folder, folder / "whole", name), folder / "log")) == 0, (
                folder / "log"
            ).read_text()
            wholes[name] = snapshot(folder / "whole")
            shutil.rmtree(folder / "whole")
        trial = Trial(folder, name, random.Random(f"{seed} {number}"), wholes[name])
        tried[kind] += 1
        began = time.monotonic()
        try:
            FAULTS[kind](trial)
            survived[kind] += 1
            print(f"fault {number}, {kind}, {name}: survived, {time.monotonic() - began:.1f} s", file=sys.stderr)
            kills += trial.kills
        except AssertionError as error:
            failed.append({"number": number, "fault": kind, "run": name, "error": str(error)[:2000]})
            print(f"fault {number}, {kind}, {name}: {error}"[:3000], file=sys.stderr)
        yield {
            "config": {"count": count, "seed": seed, "runs": list(RUNS), "steps": STEPS},
            "tried": dict(tried),
            "survived": dict(survived),
            "processes_killed": kills,
            "total_tried": sum(tried.values()),
            "total_survived": sum(survived.values()),
            "failed": failed,
        }


def warm_up(folder):
    """A run in this process, so that its children find imported what a run uses."""
    write_rows(folder)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        assert cli.run(arguments(folder, folder / "warm", "zo_sgd, lora")) == 0


def write_rows(folder):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="zotune-faults-") as folder:
        warm_up(Path(folder))
        for found in inject(args.count, args.seed, Path(folder)):
            found["seconds"] = round(time.monotonic() - began)
            found["environment"] = machine.environment()
            if args.output:
                json_files.write_json(args.output, found)
    print(json.dumps(found, indent=2))
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
