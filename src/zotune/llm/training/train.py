"""One run of fine-tuning: `train(config) -> Result`. Zeroth-order methods and first-order baselines share it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zotune.errors import NotWrittenError, RunError, UsageError
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.run import TrainConfig
from zotune.llm.models.activation_cache import ReusedActivations
from zotune.llm.models.cache_storage import File, Kept, Memory
from zotune.llm.models.load import LanguageModel, load
from zotune.llm.models.prompt_cache import ReusedPrompts
from zotune.llm.models.tuned_parameters import prepare
from zotune.llm.scoring.accuracy import Measured, Scorer
from zotune.llm.tasks import head_labels
from zotune.llm.tasks.load_data import Rows, load_rows
from zotune.llm.tasks.user_data import RESOLVED
from zotune.llm.training.best_model import check_rows
from zotune.llm.training.loop import Run
from zotune.llm.training.output_folder import OutputFolder, environment
from zotune.llm.training.resume import check_same_run
from zotune.llm.training.signals import Stop, stoppable
from zotune.messages import Display, say
from zotune.system.peak_memory import peak_memory


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        output_dir: where model, config, metrics and results are.
        num_steps, num_skipped: updates, and steps left out for a loss that was not a number.
        best_step: the step that was best on the held-out rows, where that was asked for; 0 is the untuned model.
        stopped_early: whether the run ended for want of a better one.
        num_forwards: forward passes of the training, evaluations not counted; num_tokens: tokens that these read.
        num_tuned: how many numbers were tuned.
        seconds: the training's, evaluations not counted.
        peak_memory: the process's, in bytes.
        dev_before, dev, test: accuracy (F1 of generated answers) on the held-out rows before and after, and on the
            evaluation rows; the last two of the model that is saved.
        stopped_by: the signal that ended the run early, or None.
    """

    output_dir: Path
    num_steps: int
    num_skipped: int
    num_forwards: int
    num_tokens: int
    num_tuned: int
    seconds: float
    peak_memory: int
    dev_before: Measured | None
    dev: Measured | None
    test: Measured | None
    stopped_by: int | None
    best_step: int | None
    stopped_early: bool

    def to_json(self) -> dict[str, Any]:
        """As results.json holds it, versions and machine included."""
        plain = {k: v for k, v in asdict(self).items() if not isinstance(getattr(self, k), Measured)}
        found = {k: v.summary() for k in ("dev_before", "dev", "test") if isinstance(v := getattr(self, k), Measured)}
        return {**plain, "output_dir": str(self.output_dir), **found, "environment": environment()}


def train(config: TrainConfig) -> Result:
    """Fine-tune as `config` says; the tuned model and all that is known of the run go to `config.output_dir`.

    Raises:
        UsageError: the run cannot start as asked.
        RunError: it failed on the way; metrics, and weights where there are sound ones, are kept.
    """
    lm = load(config, head_labels(config), config.seed)
    # Virtual tokens take of the context that the rows must fit into.
    prepare(lm, config)
    rows = load_rows(lm, config)
    if not rows.train:
        raise UsageError("there is no row to train on: give --train-file, or --data-source with training rows.")
    check_rows(config, rows.dev, rows.test)
    # What was told from the rows is saved with the rest, so that an evaluation need not be told again.
    config = config.model_copy(update={name: getattr(rows.options, name) for name in RESOLVED})
    for note in rows.notes:
        say(note)
    with closing(OutputFolder(config)) as output:
        if output.is_resumed:
            check_same_run(output.before, config)
        output.check_room(lm)
        scorer, rows = _scorer(lm, rows, config), _prompts_reused(lm, rows, config)
        with closing(Run(lm, rows, config, scorer, output)) as run:
            return _train(run, config.model_copy(update={"resume": False}))


def _train(run: Run, config: TrainConfig) -> Result:
    """The steps, then what is saved and reported."""
    lm, rows, output = run.lm, run.rows, run.output
    before = run.before()
    with Display(config.max_steps) as display, stoppable() as stop:
        try:
            run.steps(display, stop)
        except NotWrittenError:
            # Weights that no ledger knows of are not the run's.
            raise
        except RunError:
            # The weights are those of the last sound step, or of the best.
            run.selection.restore()
            output.save_model(lm)
            raise
    run.selection.restore()
    output.save_model(lm)
    # Who stops a run wants it to end, not to evaluate.
    dev = run.after() if stop.signal is None else None
    test = dev if rows.test == rows.dev or stop.signal is not None else run.evaluate(rows.test)
    result = _result(run, before, dev, test, stop)
    output.finish({**result.to_json(), "config": config.model_dump(mode="json")}, config, lm, test)
    return result


def _result(run: Run, before: Measured | None, dev: Measured | None, test: Measured | None, stop: Stop) -> Result:
    """What came of the run."""
    return Result(
        output_dir=run.config.output_dir,
        num_steps=run.counters.step,
        num_skipped=run.counters.num_skipped,
        num_forwards=run.counters.num_forwards,
        num_tokens=run.tokens_read(),
        num_tuned=sum(p.numel() for p in run.lm.module.parameters() if p.requires_grad),
        seconds=run.counters.seconds,
        peak_memory=peak_memory(run.lm.device),
        dev_before=before,
        dev=dev,
        test=test,
        stopped_by=stop.signal,
        best_step=run.selection.step,
        stopped_early=run.selection.is_over,
    )


def _scorer(lm: LanguageModel, rows: Rows, config: TrainConfig) -> Scorer:
    """How rows are scored: the layers below the tuned ones once a row, where they are the same in every pass."""
    if rows.generated is not None:
        return lm.score  # which nothing asks for
    drops = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in lm.module.modules())
    if drops and config.method in FIRST_ORDER:  # a step of back-propagation leaves dropout on
        return lm.score
    splits = [[s for e in split for s in e.sequences] for split in (rows.train, rows.dev, rows.test)]
    reused = ReusedActivations(lm, _kept(config), splits)
    if reused.depth and config.reuse_activations:
        file = f" and {config.reuse_file:g} GiB of a file" if config.reuse_file else ""
        say(
            f"reusing activations: layers 1 to {reused.depth} of {reused.num_layers} lie below what is tuned and are "
            f"computed once a row; that takes {reused.num_bytes / 2**30:.2g} GiB, of which at most "
            f"{config.reuse_memory:g} GiB of memory{file}"
        )
    return reused.score


def _prompts_reused(lm: LanguageModel, rows: Rows, config: TrainConfig) -> Rows:
    """The rows, their prompts' part below the tuned layers computed once where text is generated from them."""
    if rows.generated is None:
        return rows
    reused = ReusedPrompts(lm, _kept(config))
    if reused.depth and config.reuse_activations:
        say(
            f"reusing prompts: what they leave in layers 1 to {reused.depth} of {reused.num_layers}, below what is "
            f"tuned, is computed once and kept in at most {config.reuse_memory:g} GiB of memory"
        )
    generated = replace(rows.generated, starting=reused.starting)
    return replace(rows, generated=generated, measure=generated.measure)


def _kept(config: TrainConfig) -> Kept:
    """Where the activations of those layers are kept."""
    if not config.reuse_activations:
        return Kept()
    memory, file = (int(gib * 2**30) for gib in (config.reuse_memory, config.reuse_file))
    return Kept([Memory(memory), *([File(file, config.output_dir)] if file else [])])
