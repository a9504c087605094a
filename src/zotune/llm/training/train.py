"""One run of fine-tuning, with a zeroth-order method or a first-order baseline, in three stages.

`train` resolves what a config names, a model and rows, and calls `tune`, which runs the steps on a model and rows that
are there. Whatever is written goes to an output that `tune` is given: a folder, or memory alone. Python's `train` of a
loaded model (`zotune.llm.api`) enters at the second stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zotune.errors import NotWrittenError, RunError, UsageError
from zotune.ledger import read
from zotune.llm.callbacks.trackers import all_callbacks
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.run import NEW_RUN, TrainConfig, recorded_choices
from zotune.llm.distributed.agreement import check_start, tuned_digest
from zotune.llm.distributed.mesh import mesh_of, together
from zotune.llm.models.activation_cache import SequenceCache
from zotune.llm.models.activation_storage.tiers import ActivationStore, FileTier, MemoryTier
from zotune.llm.models.continued_adapter import own_options
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import load
from zotune.llm.models.prompt_cache import PromptCache
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.models.tuned_sets.aim import Aim, num_free, recorded_aim
from zotune.llm.models.tuned_sets.find import find_aim, needs_aim, set_aim
from zotune.llm.output.checkpoint_folder import check_checkpoint
from zotune.llm.output.locked_folder import tidy
from zotune.llm.output.manifest import LEDGER
from zotune.llm.output.output_folder import OutputFolder
from zotune.llm.output.result import Result as Result
from zotune.llm.rows.sources import UserRows, read_checked_files
from zotune.llm.scoring.accuracy import Evaluation, Scorer
from zotune.llm.scoring.metrics import with_measure
from zotune.llm.sharing.hub import check_upload, upload_after
from zotune.llm.tasks import head_labels
from zotune.llm.tasks.load_data import EncodedData, load_training_rows
from zotune.llm.tasks.user_data import RESOLVED_OPTIONS
from zotune.llm.training.best_model import check_rows
from zotune.llm.training.find_rate import find_rate, with_steps_and_rate
from zotune.llm.training.in_memory import Output, open_output
from zotune.llm.training.learning_rate import schedule_of
from zotune.llm.training.loop import Run
from zotune.llm.training.origin import data_digest, origin_of, recorded_options
from zotune.llm.training.progress import Display
from zotune.llm.training.signals import StopRequest, stop_on_signal
from zotune.messages import say
from zotune.system.peak_memory import peak_memory
from zotune.system.processes import PeerError, Processes, is_restarted


def train(config: TrainConfig, *, callbacks: Sequence[Any] = (), given: UserRows | None = None) -> Result:
    """Fine-tune a model, and write it with its config, metrics and results to `config.output_dir`.

    Args:
        config: the options of the run, as on the command line of `zotune train`.
        callbacks: transformers' `TrainerCallback` objects, which are called as its `Trainer` would call them.
        given: the rows of the config's files, if they have been read; None: they are read first.

    Returns:
        The result, whose metrics are those of the saved model.

    Raises:
        UsageError: the run cannot start as configured; the message says what to change.
        RunError: the run failed; its metrics, and its weights if they are finite, are saved.

    The model in this example has random weights; `smollm2-135m` is the smallest real one.

    >>> import tempfile
    >>> from zotune.llm import TrainConfig, train
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = TrainConfig(
    ...         model="random:opt-tiny", task="sst2", method="zo_sgd", max_steps=2, num_train=8, num_dev=4, num_eval=4,
    ...         output_dir=folder, device="cpu",
    ...     )
    ...     result = train(config)
    >>> result.num_steps
    2
    """
    # Before anything is loaded.
    callbacks = all_callbacks(config.report_to, callbacks)
    schedule_of(config)
    check_upload(config)
    with together(config.timeout) as processes:
        return _train_together(config, callbacks, given, processes)


def _train_together(
    config: TrainConfig, callbacks: Sequence[Any], given: UserRows | None, processes: Processes
) -> Result:
    if is_restarted():
        config = config.model_copy(update={"resume": True, "overwrite_output_dir": False})
    if config.resume_from_checkpoint is not None:
        check_checkpoint(config.resume_from_checkpoint, config.output_dir)
    config = config.model_copy(update=processes.first(lambda: recorded_choices(config)))
    given = read_checked_files(config) if given is None else given
    processes.first(lambda: tidy(Path(config.model)))
    lm = load(config, head_labels(config), config.seed)
    lm.mesh = mesh_of(config, processes, lm, lm.base)
    # First, because virtual tokens reduce the context that the rows must fit into.
    prepare_tuning(lm, config)
    rows = load_training_rows(lm, config, given)
    del given  # the run holds its rows as tokens
    config = with_options_of(lm, rows, config)
    check_alike(lm, rows, config)
    with closing(open_output(config, processes)) as output:
        return tune(lm, rows, config, output, callbacks)


def check_alike(lm: LanguageModel, rows: EncodedData, config: TrainConfig) -> None:
    """Check that all processes of a run begin it with the same options, rows and weights.

    Raises:
        UsageError: they do not.
    """
    if lm.mesh.is_alone:
        return
    begins = {
        **{f"option {name}": value for name, value in recorded_options(config).items()},
        "training rows": data_digest(rows.train),
        "held-out rows": data_digest(rows.dev),
        "evaluation rows": data_digest(rows.test),
        "model": origin_of(lm, (), None),
        "tuned weights": tuned_digest(lm.module),
    }
    check_start(lm.mesh.processes, begins)


def with_options_of(
    lm: LanguageModel, rows: EncodedData, config: TrainConfig, tell: Callable[[str], None] = say
) -> TrainConfig:
    """Check the rows of a run, `tell` the remarks on them, and return the config with what was inferred from them.

    These options are saved, so that an evaluation inherits them.

    Raises:
        UsageError: there are no rows to train on, or to select the best step by.
    """
    if not rows.train:
        raise UsageError("there is no training row: give --train-file, or a --data-source with training rows.")
    check_rows(config, rows.dev, rows.test)
    config = config.model_copy(update={name: getattr(rows.options, name) for name in RESOLVED_OPTIONS})
    config = config.model_copy(update=own_options(lm, config))
    config, notes = with_steps_and_rate(lm, config, len(rows.train))
    for note in (*rows.notes, *notes):
        tell(note)
    return config


def tune(
    lm: LanguageModel, rows: EncodedData, config: TrainConfig, output: Output, callbacks: Sequence[Any] = ()
) -> Result:
    """Tune a model on rows, and write to the output whatever it takes.

    Args:
        lm: the model, of which exactly the tuned parameters require a gradient.
        rows: the rows as tokens of the model.
        config: the options of the run; those that name the model, the rows and the output were used before.
        output: the folder of the run, or memory alone.
        callbacks: transformers' callbacks, those of trackers among them.

    Raises:
        UsageError, RunError: as `train`.
    """
    output.check_free_space(lm)
    _aim(lm, rows, config, output)
    store = _activation_store(config, output)
    scorer, rows = _scorer(lm, rows, config, store), _with_prompt_cache(lm, rows, config, store)
    config = _with_found_rate(lm, rows, config, scorer, output)
    with closing(Run(lm, rows, config, scorer, output, callbacks)) as run:
        result = _train(run, config.model_copy(update=NEW_RUN))
    if result.stopped_by is None and lm.mesh.processes.is_first:
        upload_after(config, result.output_dir)
    return result


def _aim(lm: LanguageModel, rows: EncodedData, config: TrainConfig, output: Output) -> None:
    """Find by forward passes what the tuned set needs, or read it from the ledger of a run that is resumed."""
    if not needs_aim(config):
        return

    def found() -> Aim:
        path = output.source / LEDGER if isinstance(output, OutputFolder) and output.is_resumed else None
        recorded = recorded_aim(read(path)) if path is not None and path.is_file() else None
        return find_aim(lm, config, rows.train) if recorded is None else recorded

    set_aim(lm, lm.mesh.processes.first(found))


def _with_found_rate(
    lm: LanguageModel, rows: EncodedData, config: TrainConfig, scorer: Scorer, output: Output
) -> TrainConfig:
    """Return the config with the learning rate that short trials find, if it asks for that; record the rate."""
    if config.learning_rate != "auto":
        return config
    found = find_rate(lm, rows, config, lambda some, options: Run(lm, some, options, scorer, output), output.scratch)
    config = config.model_copy(update={"learning_rate": found.learning_rate})
    output.record_search(config, found.to_json())
    return config


def _train(run: Run, config: TrainConfig) -> Result:
    """Run all steps, save the model, and evaluate it; an interrupt says how to go on."""
    try:
        return _train_to_the_end(run, config)
    except KeyboardInterrupt:
        step = run.counters.step
        if not step or run.output.path is None:
            raise
        place = "" if run.journal.has_ledger else " from its last checkpoint"
        message = f"interrupted after step {step}; the same command with --resume goes on{place}"
        raise KeyboardInterrupt(message) from None


def _train_to_the_end(run: Run, config: TrainConfig) -> Result:
    lm, rows, output = run.lm, run.rows, run.output
    run.journal.check()
    before = run.evaluate_before()
    processes = lm.mesh.processes
    processes.first(output.begin)
    with Display(config.max_steps) as display, stop_on_signal() as stop:
        processes.attention = lambda: stop.signal or 0
        try:
            run.run_steps(display, stop)
        except (NotWrittenError, PeerError):
            # The weights may be ahead of the ledger, or those of another process, so they are not saved.
            raise
        except RunError:
            # The weights are those of the last step with a finite loss, or of the best step.
            run.selection.restore()
            output.save_model(lm)
            raise
        finally:
            processes.attention = int
    stop.signal = max(processes.every(lambda: stop.signal or 0)) or None
    run.selection.restore()
    output.save_model(lm)
    # A stopped run ends without evaluations.
    dev = run.evaluate_after() if stop.signal is None else None
    if dev is not None and not config.load_best_model_at_end:
        run.events.log_evaluation(dev.summary())
    test = dev if rows.test == rows.dev or stop.signal is not None else run.evaluate(rows.test)
    result = _result(run, before, dev, test, stop)
    output.finish({**result.to_json(), "config": config.model_dump(mode="json")}, config, lm, test)
    run.events.end()
    return result


def _result(
    run: Run, before: Evaluation | None, dev: Evaluation | None, test: Evaluation | None, stop: StopRequest
) -> Result:
    """Collect the result of the run."""
    return Result(
        output_dir=run.output.path,
        num_steps=run.counters.step,
        num_skipped=run.counters.num_skipped,
        num_forwards=run.counters.num_forwards,
        **run.spent(),
        num_tokens=run.tokens_read(),
        num_tuned=num_free(run.lm.module, run.lm.aim),
        seconds=run.counters.seconds,
        peak_memory=peak_memory(run.lm.device),
        dev_before=before,
        dev=dev,
        test=test,
        stopped_by=stop.signal,
        best_step=run.selection.step,
        stopped_early=run.stops_early,
        model=run.lm.module,
        tokenizer=run.lm.tokenizer,
        log_history=tuple(run.output.metrics.lines()),
    )


def _scorer(lm: LanguageModel, rows: EncodedData, config: TrainConfig, store: ActivationStore) -> Scorer:
    """Return the function that scores rows; it caches activations below the tuned layers if they never change."""
    if rows.generated is not None:
        return lm.score  # not used for generated text
    if config.streaming or lm.mesh.is_sharded:
        return lm.score  # a cache would hold the rows; a pass of a model in shards is not broken off
    drops = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in lm.module.modules())
    if drops and config.method in FIRST_ORDER:  # steps of back-propagation use dropout
        return lm.score
    splits = [[s for e in split for s in e.sequences] for split in (rows.train, rows.dev, rows.test)]
    cache = SequenceCache(lm, store, splits, config.reuse_folder if config.reuse_activations else None)
    if cache.depth and config.reuse_activations:
        file = f" and {config.reuse_file:g} GiB of a file" if config.reuse_file else ""
        say(
            f"caching activations: layers 1 to {cache.depth} of {cache.num_layers} are below the tuned parameters and "
            f"are "
            f"computed once per row; all rows take {cache.num_bytes / 2**30:.2g} GiB, the cache at most "
            f"{config.reuse_memory:g} GiB of memory{file}"
        )
    return cache.score


def _with_prompt_cache(
    lm: LanguageModel, rows: EncodedData, config: TrainConfig, store: ActivationStore
) -> EncodedData:
    """Return the rows with a cache of the prompts below the tuned layers, if text is generated from them."""
    if rows.generated is None or lm.mesh.is_sharded:
        return rows
    cache = PromptCache(lm, store)
    if cache.depth and config.reuse_activations:
        say(
            f"caching prompts: layers 1 to {cache.depth} of {cache.num_layers} are below the tuned parameters and are "
            f"computed once per prompt; the cache takes at most {config.reuse_memory:g} GiB of memory"
        )
    generated = replace(rows.generated, prefill=cache.prefill)
    return replace(rows, generated=generated, measure=with_measure(rows.measure, generated.measure))


def _activation_store(config: TrainConfig, output: Output) -> ActivationStore:
    """Return the storage of cached activations, without a tier if caching is off."""
    if not config.reuse_activations:
        return ActivationStore()
    memory, file = (int(gib * 2**30) for gib in (config.reuse_memory, config.reuse_file))
    return ActivationStore(
        [MemoryTier(memory), *([FileTier(file, output.path)] if file and output.path is not None else [])]
    )
