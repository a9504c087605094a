"""Evaluating a model that is loaded, on rows in memory."""

from __future__ import annotations

from typing import Any, overload

from zotune.errors import UsageError
from zotune.llm.api.arguments import config_of, in_words_of_python, say_in_python
from zotune.llm.api.loaded import borrowed
from zotune.llm.api.rows import rows_of
from zotune.llm.config.run import EvalConfig
from zotune.llm.ledger import voting as by_name
from zotune.llm.rows.sources import UserRows
from zotune.llm.scoring.accuracy import Evaluation
from zotune.llm.tasks.load_data import load_rows
from zotune.llm.training.evaluation import TaskEvaluation

# Options that need the name of a model, a task, or a folder.
_BY_NAME = ("num_demonstrations", "baselines", "predictions", "output_dir", "vote")


@overload
def evaluate(model: EvalConfig) -> tuple[dict[str, TaskEvaluation], dict[str, Any]]: ...


@overload
def evaluate(model: Any, tokenizer: Any, eval_dataset: Any, **options: Any) -> Evaluation: ...


def evaluate(
    model: Any, tokenizer: Any = None, eval_dataset: Any = None, **options: Any
) -> Evaluation | tuple[dict[str, TaskEvaluation], dict[str, Any]]:
    """Evaluate a loaded model on rows in memory, or what an `EvalConfig` names, with a 95 % interval.

    Args:
        model: the model, as for `zotune.llm.train`. Or an `EvalConfig`, which names everything, as on the command line
            of `zotune eval`.
        tokenizer: the model's tokenizer (or its processor).
        eval_dataset: the rows, as for `zotune.llm.train`; of a stream the first `num_eval` rows are read.
        options: further options of `EvalConfig` by name: `template`, `verbalizer`, `per_device_eval_batch_size`, …
            Give those that the model was tuned with.

    Returns:
        The evaluation: accuracy for rows with labels or choices, log-loss for completions and chats, F1 with
        `exact_match`, the mean reward with a reward function as `objective`. For an `EvalConfig` the result of each
        task by name, that of rows under the name "rows"; and all results as JSON, the content of `results.json`.

    Raises:
        UsageError: an option, a row or a task does not suit the model, or there is no row.

    A model with random weights is right as often as chance:

    >>> from zotune.llm import EvalConfig, evaluate, load
    >>> model, tokenizer = load("random:opt-tiny", device="cpu")
    >>> rows = [{"text": "a gorgeous film", "label": "good"}, {"text": "dull", "label": "bad"}]
    >>> evaluate(model, tokenizer, rows).num_examples
    2
    >>> results, _ = evaluate(EvalConfig(model="random:opt-tiny", task="sst2", num_eval=8, device="cpu"))
    >>> 0 <= results["sst2"].evaluation.value <= 1
    True
    """
    if isinstance(model, EvalConfig):
        return by_name.evaluate(model)
    with in_words_of_python(), borrowed(model, tokenizer) as lm:
        _check_arguments(eval_dataset, options)
        config = config_of(EvalConfig, lm, options, "evaluate")
        given = UserRows(eval=rows_of(eval_dataset, "eval_dataset", config.num_eval, "validation", config.delimiter))
        rows = load_rows(lm, config, given)
        for note in rows.notes:
            say_in_python(note)
        return rows.measure(lm, rows.test, config.per_device_eval_batch_size, objective=rows.objective)


def _check_arguments(eval_dataset: Any, options: dict[str, Any]) -> None:
    if eval_dataset is None:
        raise UsageError("there are no rows: evaluate(model, tokenizer, eval_dataset), a list of dicts for instance.")
    named = next((name for name in _BY_NAME if name in options), None)
    if named is not None:
        raise UsageError(f"evaluate() of a loaded model has no option {named!r}; evaluate(EvalConfig({named}=…)) has.")
