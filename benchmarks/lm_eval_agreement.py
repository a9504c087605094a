"""Check that EleutherAI's lm-eval gives the predictions and scores of `zotune eval` on the same rows.

    make test-lm-eval

This trains an adapter on SST-2 for a minute and runs `zotune eval` with it on SST-2, and with the base model on RTE,
COPA and WinoGrande. It defines local tasks of lm-eval from the written prompts and candidates and compares row by row.
lm-eval reports sums of log-probabilities; zotune's score is the sum divided by the candidate's number of tokens. The
exit code is 1 if a prediction differs for another reason than a tie.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "speed"))
from record import write_result, zotune

from zotune.llm.models.builtin import fetch

# Both sides compute log-probabilities in float32; different orders of summation differ by up to this much.
TOLERANCE = 1e-3


def by_lm_eval(
    name: str, rows: list[dict[str, Any]], folder: Path, adapter: str | None
) -> tuple[float, list[list[float]]]:
    """lm-eval's accuracy by sums of log-probabilities, and these sums for the candidates of each row."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"id": i, **row}) + "\n" for i, row in enumerate(rows)), encoding="utf-8")
    task = {
        "task": f"zotune_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "candidates",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    model = HFLM(
        pretrained=str(fetch("smollm2-135m")),
        peft=adapter,
        dtype="float32",
        device="cpu",
        batch_size=16,
        max_length=2048,
    )
    found = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, log_samples=True)
    assert found is not None
    samples = sorted(found["samples"][f"zotune_{name}"], key=lambda sample: sample["doc"]["id"])
    assert [sample["doc"]["prompt"] for sample in samples] == [row["prompt"] for row in rows]
    sums = [[float(resp[0]) for resp in sample["filtered_resps"]] for sample in samples]
    return float(found["results"][f"zotune_{name}"]["acc,none"]), sums


def compare(rows: list[dict[str, Any]], acc: float, sums: list[list[float]], tokenizer: Any) -> dict[str, Any]:
    """The agreement of both evaluators; lm-eval's own `acc` is comparable only if all candidates are single tokens."""
    single, same, worst, theirs, unexplained = True, 0, 0.0, [], 0
    for row, candidates in zip(rows, sums, strict=True):
        start = len(tokenizer(row["prompt"])["input_ids"])
        lengths = [len(tokenizer(row["prompt"] + c)["input_ids"]) - start for c in row["candidates"]]
        single &= set(lengths) == {1}
        scores = [total / n for total, n in zip(candidates, lengths, strict=True)]
        gap = max(abs((s - scores[0]) - (o - row["scores"][0])) for s, o in zip(scores, row["scores"], strict=True))
        worst = max(worst, gap)
        best = scores.index(max(scores))
        theirs.append(float(best == row["label"]))
        same += best == row["prediction"]
        unexplained += best != row["prediction"] and gap > TOLERANCE
    n = len(rows)
    return {
        "num_examples": n,
        "accuracy_zotune": sum(row["accuracy"] for row in rows) / n,
        "accuracy_lm_eval": sum(theirs) / n,
        "acc_as_lm_eval_reports_it": acc if single else None,
        "same_predictions": same,
        "differing_beyond_a_tie": unexplained,
        "largest_difference_of_scores": worst,
    }


def main() -> None:
    """Train, evaluate twice, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100, help="evaluation rows of each task")
    parser.add_argument("--steps", type=int, default=50, help="training steps of the adapter")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(fetch("smollm2-135m")))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapter = str(folder / "adapter")
        recipe = ("train", "sst2-smollm2-fo", "--dtype", "float32", "--num-eval", "1", "--num-dev", "1")
        zotune(*recipe, "--max-steps", str(options.steps), "--output-dir", adapter)
        for task in ("sst2", "rte", "copa", "winogrande"):
            model = ("--model", adapter) if task == "sst2" else ()
            predictions = folder / f"{task}-predictions.jsonl"
            rows_of = ("--num-eval", str(options.rows), "--predictions", str(predictions))
            zotune("eval", "--task", task, "--dtype", "float32", "--device", "cpu", *model, *rows_of)
            rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
            both = by_lm_eval(task, rows, folder, adapter if model else None)
            found[task] = {"model": "adapter" if model else "smollm2-135m", **compare(rows, *both, tokenizer)}
            print(task, found[task], flush=True)
    write_result("lm-eval", {"lm_eval": version("lm-eval"), "train_steps": options.steps, "tasks": found})
    if any(
        entry["differing_beyond_a_tie"] or entry["largest_difference_of_scores"] > TOLERANCE for entry in found.values()
    ):
        sys.exit("lm-eval and zotune disagree")


if __name__ == "__main__":
    main()
