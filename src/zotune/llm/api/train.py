"""Tuning a model that is loaded, on rows in memory: the second stage of `zotune.llm.training.train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

from zotune.errors import UsageError
from zotune.llm.api.arguments import config_of, in_words_of_python, our_names, say_in_python
from zotune.llm.api.loaded import borrowed
from zotune.llm.api.plain_model import holds_earlier_adapter
from zotune.llm.api.rows import rows_of, stream_of
from zotune.llm.callbacks.trackers import all_callbacks
from zotune.llm.checkpoints.adapter_merge import is_adapter
from zotune.llm.checkpoints.tuned_tensors import check_saved
from zotune.llm.config.method import MethodName
from zotune.llm.config.run import TrainConfig, recorded_choices
from zotune.llm.config.tuning import OF_THE_MODEL, TuningOptions
from zotune.llm.distributed.mesh import mesh_of, together
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.output.checkpoint_folder import check_checkpoint
from zotune.llm.output.result import Result
from zotune.llm.rows.sources import MAX_STREAMED_EVALUATION, UserRows
from zotune.llm.sharing.hub import check_upload
from zotune.llm.tasks.load_data import EncodedData, load_training_rows
from zotune.llm.training import train as by_name
from zotune.llm.training.in_memory import MemoryOutput, open_output
from zotune.llm.training.learning_rate import schedule_of
from zotune.llm.training.train import check_alike, tune, with_options_of
from zotune.messages import say
from zotune.system.processes import TIMEOUT

# Options of what a run writes or reads in its folder.
_OF_THE_FOLDER = (
    *("overwrite_output_dir", "resume", "resume_from_checkpoint", "reuse_file"),
    *("save_steps", "save_strategy", "save_total_limit", "push_to_hub"),
)


@overload
def train(model: TrainConfig, *, callbacks: Sequence[Any] = ()) -> Result: ...


@overload
def train(
    model: Any,
    tokenizer: Any,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    method: MethodName = "zo_sgd",
    tuning: str | None = None,
    learning_rate: float | Literal["auto"] | None = None,
    output_dir: str | Path | None = None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> Result: ...


def train(
    model: Any,
    tokenizer: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    *,
    method: MethodName = "zo_sgd",
    tuning: str | None = None,
    learning_rate: float | Literal["auto"] | None = None,
    output_dir: str | Path | None = None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> Result:
    """Fine-tune a loaded model on rows in memory, or what a `TrainConfig` names, with forward passes only.

    The run computes the same bits as `zotune train` on the same model, rows and options.

    Args:
        model: a causal or masked language model of transformers, or a `peft.PeftModel`, where its owner put it: on a
            GPU, on several devices, quantised or offloaded. Or a `TrainConfig`, which names everything, as on the
            command line.
        tokenizer: the model's tokenizer (or its processor).
        train_dataset: rows as dicts: a list, a `datasets.Dataset`, another iterable, or the path of a file. Rows have
            `text` and `label`, `prompt` and `completion` (texts or messages), `messages`, `prompt`, `choices` and
            `label`, `instruction` and `output` (Alpaca), or `conversations` (ShareGPT). Of a stream without a length
            the first `num_train` (and `num_dev`) rows are read; a run holds its rows in memory.
        eval_dataset: rows for evaluations during and after the run; default: `num_dev` rows held out of
            `train_dataset`, of which there are none by default.
        method: the optimisation method; see `zotune.METHODS`.
        tuning: the parameters to tune: `lora`, the default, `full`, `head`, `prefix`, `prompt`, `scales` or `peft`. Of
            a `PeftModel` those that require a gradient are tuned, and `tuning` is left out. With `full`, parameters
            that do not require a gradient stay frozen.
        learning_rate: the learning rate η at the first step; `auto` finds one by short trials. Default: one that suits
            what is tuned.
        output_dir: folder for the model, its ledger, metrics and results; None: nothing is written.
        callbacks: transformers' `TrainerCallback` objects, which are called as its `Trainer` would call them.
        options: further options of `TrainConfig` by name: `max_steps`, `mu`, `per_device_train_batch_size`, …;
            `objective` may be a reward function.

    Returns:
        The result. `result.model` is the tuned model: the model itself, or a `PeftModel` around it. Every module has
        the mode that it had, and no parameter's `requires_grad` has changed but those of a model with a new adapter.

    Raises:
        UsageError: the run cannot start; the message says what to change.
        RunError: the run failed. A new adapter is taken away again; tuned weights of the model are those of the last
            step.

    Ctrl-C ends the run after the step in progress, and the result has the model so far; a second one raises
    KeyboardInterrupt. The model in this example is tiny and has random weights:

    >>> from zotune.llm import load, train
    >>> model, tokenizer = load("random:llama-tiny", device="cpu")
    >>> rows = [{"text": text, "label": "good" if i % 2 else "bad"} for i, text in enumerate(["dull", "fine"] * 4)]
    >>> result = train(model, tokenizer, rows, rows, max_steps=2, per_device_train_batch_size=4)
    >>> type(result.model).__name__, result.num_steps, result.test.num_examples
    ('PeftModelForCausalLM', 2, 8)
    """
    if isinstance(model, TrainConfig):
        _check_alone(tokenizer, train_dataset, eval_dataset, output_dir, learning_rate, tuning, *options.values())
        return by_name.train(model, callbacks=callbacks)
    _check_own_weights(model, tuning)
    named = {"tuning": tuning, "learning_rate": learning_rate, "output_dir": output_dir}
    options |= {"method": method, **{k: v for k, v in named.items() if v is not None}}
    timeout = float(options.get("timeout", TIMEOUT))
    with in_words_of_python(), together(timeout) as processes, borrowed(model, tokenizer) as lm:
        _check_rows_given(train_dataset)
        config = config_of(TrainConfig, lm, _complete(lm, our_names(TrainConfig, options, "train")), "train")
        _check_folder(config, output_dir)
        _check_held_out(config, eval_dataset)
        if output_dir is not None:
            config = config.model_copy(update=processes.first(lambda: recorded_choices(config)))
        callbacks = all_callbacks(config.report_to, callbacks)
        schedule_of(config)
        check_upload(config)
        given = _rows(train_dataset, eval_dataset, config)
        lm.mesh = mesh_of(config, processes, lm, lm.base)
        _prepare(lm, config)
        rows = _encoded(lm, config, given)
        config = with_options_of(lm, rows, config, say_in_python)
        check_alike(lm, rows, config)
        with closing(MemoryOutput() if output_dir is None else open_output(config, processes)) as output:
            return tune(lm, rows, config, output, callbacks)


def _check_alone(*others: Any) -> None:
    if any(value is not None for value in others):
        raise UsageError("train(TrainConfig(…)) takes the model, the rows and all options from the config alone.")


def _check_own_weights(model: Any, tuning: str | None) -> None:
    if tuning in OF_THE_MODEL and holds_earlier_adapter(model):
        raise UsageError(
            f"tuning: {tuning} changes the model's own weights, and an earlier train() put an adapter on them. Pass "
            "result.model.merge_and_unload() to tune on from it, or result.model.unload() to drop it."
        )


def _check_rows_given(train_dataset: Any) -> None:
    if train_dataset is None:
        raise UsageError("there are no rows: train(model, tokenizer, train_dataset), a list of dicts for instance.")


def _complete(lm: LanguageModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with the defaults of a loaded model: no row is held out; LoRA, or the adapter that is there.

    Raises:
        UsageError: another adapter than the model's own is to be tuned.
    """
    if not is_adapter(lm.module):
        return {"num_dev": 0, "tuning": "lora", **options}
    given = sorted(options.keys() & TuningOptions.model_fields)
    kind = str(lm.module.active_peft_config.peft_type.value).lower()  # type: ignore[union-attr]
    if given:
        raise UsageError(
            f"the model has an adapter already ({kind}), whose trainable parameters are tuned: leave out "
            f"{', '.join(given)}. To tune something else, pass the plain model, model.unload(), or one with the "
            "adapter in its weights, model.merge_and_unload()."
        )
    return {"num_dev": 0, **options, "tuning": "peft", "peft_type": kind}


def _check_folder(config: TrainConfig, output_dir: str | Path | None) -> None:
    """Refuse options of the output folder if there is none.

    Raises:
        UsageError: there is none, or the checkpoint to resume from is none.
    """
    if config.resume_from_checkpoint is not None:
        check_checkpoint(config.resume_from_checkpoint, config.output_dir)
    given = [n for n in _OF_THE_FOLDER if n in config.model_fields_set and getattr(config, n) not in ("no", False)]
    given += ["report_to: tensorboard"] if "tensorboard" in config.report_to else []
    if output_dir is None and given:
        raise UsageError(f"{given[0]} has no effect here: it needs output_dir, without which nothing is written.")


def _check_held_out(config: TrainConfig, eval_dataset: Any) -> None:
    if config.evaluates != "no" and eval_dataset is None and not config.num_dev:
        raise UsageError(
            "the run is to be evaluated on rows that it does not train on, and there are none: pass eval_dataset, or "
            "hold rows of train_dataset out with num_dev."
        )


def _rows(train_dataset: Any, eval_dataset: Any, config: TrainConfig) -> UserRows:
    told = ("validation", config.delimiter)
    if config.streaming:
        few = None if eval_dataset is None else config.num_eval or MAX_STREAMED_EVALUATION
        evaluation = None if few is None else rows_of(eval_dataset, "eval_dataset", few, *told)
        return UserRows(eval=evaluation, stream=stream_of(train_dataset, "train_dataset", delimiter=config.delimiter))
    most = None if config.num_train is None else config.num_train + (config.num_dev or 0)
    train_rows = rows_of(train_dataset, "train_dataset", most, delimiter=config.delimiter)
    if eval_dataset is None:
        return UserRows(train_rows)
    return UserRows(train_rows, rows_of(eval_dataset, "eval_dataset", config.num_eval, *told))


def _prepare(lm: LanguageModel, config: TrainConfig) -> None:
    """Let exactly the tuned parameters require a gradient.

    Raises:
        UsageError: there are none, or saving the model would lose some.
    """
    frozen = [p for p in lm.module.parameters() if not p.requires_grad]
    if is_adapter(lm.module):
        if not any(p.requires_grad for p in lm.module.parameters()):
            raise UsageError(
                "no parameter of the adapter requires a gradient, as after PeftModel.from_pretrained(…) for inference. "
                "Load it with is_trainable=True."
            )
        check_saved(lm.module, lm.name)
        return
    prepare_tuning(lm, config)
    if config.tuning != "full":
        return
    chosen = [p for p in lm.module.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    num_tuned = sum(p.requires_grad for p in chosen)
    if not num_tuned:
        raise UsageError(
            "tuning: full tunes the parameters that require a gradient, and the model has none: its owner froze them. "
            "Call model.requires_grad_(True) first, or tune an adapter (tuning='lora')."
        )
    if num_tuned < len(chosen):
        say(f"{len(chosen) - num_tuned} of {len(chosen)} tensors do not require a gradient and stay as they are")


def _encoded(lm: LanguageModel, config: TrainConfig, given: UserRows) -> EncodedData:
    """Return the rows as tokens; without held-out rows the evaluation rows are those of evaluations during the run."""
    rows = load_training_rows(lm, config, given)
    return rows if rows.dev or given.eval is None else replace(rows, dev=rows.test)
