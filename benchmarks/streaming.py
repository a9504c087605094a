"""Layers streamed from a disk: the memory, the time and the bits of such a run beside those of the run in memory.

A llama of random weights is written to a folder, 1.6 GB in float32. Each method tunes it twice, in memory and with
`--offload-folder`, in processes of their own, whose unshared memory is read from the kernel while they run. Then a
smaller model's run is killed ten times and resumed, and a pass over layers that are not in the page cache is timed
beside a plain read of their file.

    python benchmarks/streaming.py           # all of it; some 7 GB of disk and a quarter of an hour on one core
    python benchmarks/streaming.py --page    # the table in the docs again, from the results

No GPU, no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "streaming.json"
PAGE = ROOT / "docs" / "howto" / "bigger-than-memory.md"
BEGIN, END = "<!-- table: benchmarks/streaming.py -->", "<!-- end of the table -->"
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
STEPS, KILLS, KILLED_STEPS = 3, 10, 30
RUNS: dict[str, dict[str, Any]] = {
    "full, zo_sgd": {"method": "zo_sgd"},
    "full, zo_adam": {"method": "zo_adam"},
    "LoRA, zo_sgd": {"method": "zo_sgd", "tuning": "lora"},
    "LoRA on GGUF, zo_sgd": {"method": "zo_sgd", "tuning": "lora", "quantization": "gguf", "model": "smollm2-135m"},
}


def write_model(folder: Path, shape: dict[str, int]) -> Path:
    """Write a llama of random weights with a tokenizer of bytes, its embeddings tied, unless it is there."""
    if (folder / "tokenizer_config.json").exists():
        return folder
    import torch
    import transformers

    from zotune.llm.models.random_models import byte_tokenizer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=8192, max_position_embeddings=512, tie_word_embeddings=True, **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer(config).save_pretrained(folder)
    return folder


def run_here(options: dict[str, Any]) -> None:
    """Tune in this process; print what it takes beside the libraries, and then its seconds.

    A first run, of a tiny model, loads the libraries.
    """
    from zotune.llm.config.run import TrainConfig
    from zotune.llm.training.train import train
    from zotune.system.malloc import tune_malloc

    tune_malloc()
    config = TrainConfig(**options)
    tiny = {"model": "random:llama-tiny", "quantization": None, "max_steps": 1, "resume": False}
    with tempfile.TemporaryDirectory(dir=config.output_dir.parent) as folder:
        train(TrainConfig(**{**options, **tiny, "output_dir": folder, "offload_folder": None}))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"before": private_bytes(os.getpid())}), flush=True)
    result = train(config)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = usage.ru_utime + usage.ru_stime - used.ru_utime - used.ru_stime
    print(json.dumps({"seconds": result.seconds, "cpu_seconds": cpu_seconds}), flush=True)


def private_bytes(pid: int) -> int:
    """Return the resident bytes that a process shares with no other: written ones, and pages of mapped files."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def measured(options: dict[str, Any]) -> dict[str, float]:
    """Tune in a process, whose memory is read every 50 ms."""
    from zotune.system.malloc import heap_environment

    command = [sys.executable, __file__, "--child", json.dumps(options)]
    # The C library's heap is as in a process of `zotune`.
    environment = {**os.environ, **heap_environment()}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    before, peak = json.loads(process.stdout.readline())["before"], 0
    while process.poll() is None:
        try:
            peak = max(peak, private_bytes(process.pid))
        except (OSError, ProcessLookupError):
            break
        time.sleep(0.05)
    if process.wait():
        raise RuntimeError(f"the run failed: {options}")
    return {**json.loads(process.stdout.readlines()[-1]), "peak": peak - before}


def digest(folder: Path) -> str:
    """Return a digest of the tensors' bytes in a run's folder."""
    (file,) = [path for path in folder.glob("*.safetensors") if "checkpoint" not in path.name]
    found = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while part := stream.read(1 << 24):
            found.update(part)
    return found.hexdigest()


def rows_in(folder: Path) -> Path:
    """Write some rows of text with labels."""
    rows = [{"text": f"row {i} is {'fine' if i % 2 else 'dull'}", "label": ("no", "yes")[i % 2]} for i in range(8)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options_of(model: Path | str, rows: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Return the options of a run."""
    plain = {"model": str(model), "train_file": str(rows), "num_dev": 2, "device": "cpu", "output_dir": str(out)}
    steps = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-4, "template": "{text} so"}
    return {**plain, **steps, "logging_steps": STEPS, **more}


def compare(name: str, model: Path, rows: Path, work: Path) -> dict[str, Any]:
    """Tune a model in memory and streamed; compare memory, seconds and bits."""
    found: dict[str, Any] = {"run": name}
    for place in ("resident", "streamed"):
        out = work / "out"
        more = {"offload_folder": str(work)} if place == "streamed" else {}
        numbers = measured({**options_of(model, rows, out), **RUNS[name], **more})
        found[place] = {**numbers, "digest": digest(out)}
        shutil.rmtree(out)
    found["same_bits"] = found["resident"]["digest"] == found["streamed"]["digest"]
    return found


def forked(options: dict[str, Any]) -> int:
    """Tune in a child that has the libraries already; returns its process id."""
    if child := os.fork():
        return child
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            from zotune.llm.config.run import TrainConfig
            from zotune.llm.training.train import train

            train(TrainConfig(**options))
    except BaseException:
        os._exit(1)
    os._exit(0)


def killed(model: Path, rows: Path, work: Path) -> dict[str, Any]:
    """Kill a streamed run at ten random moments, resume it each time, and compare its weights with a whole run's."""
    import zotune.llm.training.train  # noqa: F401 - the children have it then

    whole, out = work / "whole", work / "killed"
    options = {"max_steps": KILLED_STEPS, "method": "zo_adam", "logging_steps": 1}
    assert os.waitpid(forked(options_of(model, rows, whole, **options)), 0)[1] == 0
    again = options_of(model, rows, out, **options, offload_folder=str(work), resume=True)
    log, draw, reached = out / "metrics.jsonl", random.Random(0), []

    def steps() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    for kill in range(KILLS):
        # At a random moment within a few steps further on; the first one while the model is loaded.
        child, target = forked(again), kill * KILLED_STEPS // (KILLS + 1) + draw.randrange(3) * (kill > 0)
        while steps() < target:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reached.append(steps())
    assert os.waitpid(forked(again), 0)[1] == 0
    left = [path.name for path in work.iterdir() if path.name not in ("whole", "killed", rows.name)]
    return {"kills": len(reached), "steps_reached": reached, "same_bits": digest(whole) == digest(out), "left": left}


def cold_pass(model: Path, work: Path) -> dict[str, float]:
    """Time a forward pass with the file in the page cache, without it, and a plain read of the file."""
    import torch

    from zotune.llm.config.step import ModelOptions
    from zotune.llm.models.load import load

    lm = load(ModelOptions(model=str(model), device="cpu", offload_folder=work))
    ids, file = torch.arange(64)[None] + 5, model / "model.safetensors"

    def forget() -> None:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def timed(run: Any) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def plain_read() -> None:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass

    def run_pass() -> None:
        with torch.no_grad():
            lm.module(input_ids=ids, use_cache=False)

    run_pass()
    found: dict[str, list[float]] = {"warm": [], "read": [], "cold": []}
    for _ in range(3):
        found["warm"].append(timed(run_pass))
        forget()
        found["read"].append(timed(plain_read))
        forget()
        found["cold"].append(timed(run_pass))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def sizes_of(shape: dict[str, int]) -> dict[str, int]:
    """Return the bytes of a model's parts."""
    hidden, inner, layers = (shape[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    layer, embeddings = 4 * (4 * hidden**2 + 3 * hidden * inner), 4 * 8192 * hidden
    return {"weights": layers * layer + embeddings, "embeddings": embeddings, "layer": layer, "num_layers": layers}


def measure_run(name: str, work: Path) -> dict[str, Any]:
    """Return memory, time and bits of one kind of run, in memory and streamed."""
    sizes = sizes_of(LARGE)
    found = {"sizes": sizes, "bound": sizes["embeddings"] + 3 * sizes["layer"], "steps": STEPS}
    return {**found, name: compare(name, write_model(work / "large", LARGE), rows_in(work), work)}


def measure_cold_pass(work: Path) -> dict[str, Any]:
    """Return the seconds of a pass with and without the page cache."""
    return {"cold_pass": cold_pass(write_model(work / "large", LARGE), work)}


def measure_kills(work: Path) -> dict[str, Any]:
    """Return what came of a run that was killed ten times."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        small, place = write_model(Path(folder) / "small", SMALL), Path(folder) / "kills"
        place.mkdir()
        return {"kills": killed(small, rows_in(place), place)}


def environment() -> dict[str, Any]:
    """Return commit, versions and processor."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "machine": {"processor": platform.processor() or platform.machine(), "load": os.getloadavg()[0]},
    }


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{name: partial(measure_run, name) for name in RUNS},
    "cold pass": measure_cold_pass,
    "kills": measure_kills,
}


def table(found: dict[str, Any]) -> str:
    """Return the table of the docs."""
    lines = [
        "| run | weights | unshared memory, resident | streamed | seconds, streamed / resident | same bits |",
        "|---|--:|--:|--:|--:|:-:|",
    ]
    for run in (found[name] for name in RUNS if name in found):
        resident, streamed = run["resident"], run["streamed"]
        ratio = streamed["seconds"] / resident["seconds"]
        weights = "0.1 GB" if "GGUF" in run["run"] else f"{found['sizes']['weights'] / 1e9:.1f} GB"
        lines.append(
            f"| {run['run']} | {weights} | {resident['peak'] / 1e6:.0f} MB | {streamed['peak'] / 1e6:.0f} MB | "
            f"{ratio:.2f} | {'yes' if run['same_bits'] else 'no'} |"
        )
    return "\n".join(lines)


def cold_sentence(found: dict[str, Any]) -> str:
    """Return what the docs say of a pass over layers that the page cache does not hold."""
    seconds = found["cold_pass"]
    warm, read, cold = (seconds[name] for name in ("warm", "read", "cold"))
    size = found["sizes"]["weights"] / 1e9
    text = (
        f"A pass over 64 tokens of the {size:.1f} GB model takes {warm:.1f} s while the page cache holds the layers, "
        f"and a plain read of the file {read:.1f} s ({size / read:.1f} GB/s). After the cache has dropped the file, "
        f"the pass takes {cold:.1f} s: {cold / max(warm, read):.2f} of the larger one."
    )
    return textwrap.fill(text, 120)


def write_page(found: dict[str, Any]) -> None:
    """Write the table into the page of the docs."""
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    parts = [table(found), *([cold_sentence(found)] if "cold_pass" in found else [])]
    PAGE.write_text("\n\n".join([head + BEGIN, *parts, END + tail]), encoding="utf-8")


def main() -> None:
    """Measure, and write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page again, from the results")
    parser.add_argument("--only", choices=PARTS, help="measure one part, and keep the results of the others")
    parser.add_argument("--folder", help="a folder whose written models are used again; default: a temporary one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_here(json.loads(arguments.child))
        return
    for name in () if arguments.page else [arguments.only] if arguments.only else PARTS:
        found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        with nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory() as folder:
            found |= {**PARTS[name](Path(folder)), **environment()}
        RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
