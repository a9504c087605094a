"""Is `--learning-rate auto` as good as the best of a grid, and what does it cost? `python benchmarks/learning_rate.py`.

For each task: full runs at a grid of learning rates around the default, and one with `auto`, all of the same seeds. The
built-in model, a LoRA adapter in its last two layers, float32, so that a CPU makes it. The record has the held-out loss
and the accuracy on evaluation rows of each run, and the passes of the search.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import validate
from zotune.llm.output.environment import environment
from zotune.llm.training.train import train

OUTPUT = Path(__file__).parent / "results" / "learning-rate.json"
CHAT = [
    ("What is the colour of {}?", "It is {}, as far as I can tell."),
    ("Describe {} in a word.", "In a word: {}."),
]
THINGS = ("grass green", "snow white", "coal black", "blood red", "sky blue", "lemon yellow", "amber orange")


def chat_rows(path: Path, num_rows: int = 240) -> Path:
    """Write chat rows of short questions and answers of one style, which the base model does not have."""
    rows = []
    for i in range(num_rows):
        thing, _, colour = THINGS[i % len(THINGS)].rpartition(" ")
        question, answer = CHAT[i // len(THINGS) % len(CHAT)]
        said = f"{question.format(thing)} (number {i})"
        rows.append(
            {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answer.format(colour)}]}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options_of(task: str, steps: int, folder: Path) -> dict[str, Any]:
    """The options of a task's runs."""
    data = (
        {"train_file": str(chat_rows(folder / "chat.jsonl")), "num_dev": 60}
        if task == "chat"
        else {"task": task, "num_train": 400, "num_dev": 150, "num_eval": 400}
    )
    return {
        **data,
        **{"model": "smollm2-135m", "dtype": "float32", "device": "cpu", "tuning": "lora", "tuned_layers": 2},
        **{"lora_target_modules": ["o_proj", "down_proj"], "lora_r": 2, "lora_alpha": 4, "max_steps": steps},
        **{"lr_scheduler_type": "linear", "per_device_train_batch_size": 16, "logging_steps": 100},
    }


def measured(options: dict[str, Any], rate: float | str, seed: int) -> dict[str, Any]:
    """One run at a learning rate."""
    with tempfile.TemporaryDirectory() as folder:
        given = {**options, "learning_rate": rate, "seed": seed, "output_dir": f"{folder}/run"}
        result = train(validate(TrainConfig, given, "learning_rate.py"))
        search = Path(folder, "run", "search.json")
        found = json.loads(search.read_text(encoding="utf-8")) if search.exists() else None
    summary = {name: None if (e := getattr(result, name)) is None else e.summary() for name in ("dev", "test")}
    return {"learning_rate": rate, "seed": seed, "num_forwards": result.num_forwards, **summary, "search": found}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "trec", "chat"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    record: dict[str, Any] = {"steps": args.steps, "environment": environment(), "runs": {}}
    for task in args.tasks:
        runs = record["runs"].setdefault(task, [])
        for seed in args.seeds:
            for rate in ["auto", *args.rates]:
                with tempfile.TemporaryDirectory() as folder:
                    runs.append(measured(options_of(task, args.steps, Path(folder)), rate, seed))
                args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
