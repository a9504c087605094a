"""`zotune train --dry-run`: the data, the tuned parameters and the memory of a run, without starting or writing it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import yaml
from pydantic.fields import FieldInfo
from torch import Tensor

from zotune.errors import UsageError
from zotune.llm.callbacks.trackers import check_installed
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.activation_cache import SequenceCache
from zotune.llm.models.activation_storage.tiers import ActivationStore
from zotune.llm.models.continued_adapter import own_options
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.meta_model import load_meta_model
from zotune.llm.models.placement.device_map import Placement, check_here
from zotune.llm.models.placement.sharded import by_plan, shard_of
from zotune.llm.models.prompt_cache import PromptCache
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.models.tuned_sets.aim import num_free
from zotune.llm.models.tuned_sets.find import planned_aim
from zotune.llm.rows.sources import RowStreams, UserRows, read_checked_files
from zotune.llm.tasks import head_labels
from zotune.llm.tasks.load_data import load_examples
from zotune.llm.tasks.streaming import head_of_files
from zotune.llm.tasks.user_data import RESOLVED_OPTIONS, Data
from zotune.llm.training.find_rate import MAX_SHARE, least_run, with_steps_and_rate
from zotune.llm.training.learning_rate import schedule_of
from zotune.llm.training.optimizers import make_optimizer
from zotune.plan.live_memory import FakeScalars
from zotune.plan.memory import (
    Memory,
    cache_bytes,
    forwards_a_step,
    forwards_of_training,
    generated,
    largest_batch,
    overhead_bytes,
    recorded_bytes,
    state_bytes,
    weight_bytes,
)
from zotune.plan.passes import MAX_COPIES, forward, largest_pass
from zotune.plan.placed import Places, Slices, mib, placement_in_plan, with_placement, with_shards
from zotune.plan.shown_rows import SPLITS, EncodedRows, quantiles
from zotune.system.peak_memory import peak_memory
from zotune.system.processes import asked_for

SHOWN_REFUSED = 5
# Options that are shown though they have their defaults.
_FIRST = (
    "model",
    "task",
    "tuning",
    "method",
    "learning_rate",
    "mu",
    "max_steps",
    "per_device_train_batch_size",
    "seed",
)


@dataclass(frozen=True)
class DryRun:
    """The facts about a run before it starts.

    Attributes:
        config: the resolved recipe.
        notes: what was inferred from the user's rows.
        examples: some training rows as the model reads them, with the scored text in ⟦ ⟧.
        num_rows: number of rows of each split.
        tokens: lengths of all rows before cutting, by their longest candidate: min, median, p95 and max.
        num_cut: number of rows that --max-length cuts; num_dropped: number of rows that --long-rows drop leaves out.
        refused: reasons for the rows that the run would refuse.
        num_tuned, num_parameters: number of tuned parameters and of all parameters of the model.
        forward_passes: forward passes of one step and of the training.
        memory: bytes by purpose.
        places: where the weights lie, if not all on one device and in one process.
    """

    config: TrainConfig
    notes: tuple[str, ...]
    examples: tuple[str, ...]
    num_rows: dict[str, int]
    tokens: dict[str, float]
    num_cut: int
    num_dropped: int
    refused: tuple[str, ...]
    num_tuned: int
    num_parameters: int
    forward_passes: dict[str, int]
    memory: Memory
    places: Places | Slices | None = None

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        plain = {k: v for k, v in vars(self).items() if k not in ("config", "memory", "places")}
        places = {} if self.places is None else {"places": self.places.to_json()}
        return {"config": self.config.model_dump(mode="json"), **plain, "memory": self.memory.to_json(), **places}

    def __str__(self) -> str:
        recipe, num_others = _recipe(self.config)
        shown = "\n\n".join(f"example {i}: {text}" for i, text in enumerate(self.examples, start=1))
        rows = "{train} for training, {dev} held out, {test} for evaluation".format_map(self.num_rows)
        tokens = ", ".join(f"{name} {n:g}" for name, n in self.tokens.items())
        dropped = f"; left out: {self.num_dropped}" if self.num_dropped else ""
        refused = [f"refused: {reason}" for reason in self.refused[:SHOWN_REFUSED]]
        if len(self.refused) > SHOWN_REFUSED:
            refused.append(f"refused: {len(self.refused) - SHOWN_REFUSED} more")
        training = self.forward_passes["training"]
        is_searched = self.config.learning_rate == "auto" and self.config.max_steps >= least_run()
        search = f", and at most {MAX_SHARE * training:,.0f} to find the learning rate" if is_searched else ""
        parts = [f"{name} {mib(n)}" for name, n in asdict(self.memory).items() if n]
        return "\n".join(
            [
                yaml.safe_dump(recipe, sort_keys=False),
                f"{num_others} other options have their defaults; --json shows them",
                *self.notes,
                "",
                f"The scored text is in ⟦ ⟧.\n\n{shown}\n",
                f"rows: {rows}",
                f"tokens per row: {tokens}; cut: {self.num_cut}{dropped}; refused: {len(self.refused)}",
                *refused,
                f"tuned: {self.num_tuned:,} of {self.num_parameters:,} parameters",
                f"forward passes: {self.forward_passes['step']:,} per step, {training:,} in all{search}",
                f"expected memory: {mib(self.memory.total)} ({', '.join(parts)})",
                *([] if self.places is None else [str(self.places)]),
            ]
        )


def _recipe(config: TrainConfig) -> tuple[dict[str, Any], int]:
    """The options that make the run what it is: the first ones, and what differs from a default; how many others."""
    options = config.model_dump(mode="json")
    defaults = {name: _default(field) for name, field in TrainConfig.model_fields.items()}
    shown = {n: v for n, v in options.items() if n in _FIRST or getattr(config, n) != defaults[n]}
    return shown, len(options) - len(shown)


def _default(field: FieldInfo) -> Any:
    """The default of an option; one that follows from other options counts as none, so that the option is shown."""
    if field.default_factory is None or field.default_factory_takes_validated_data:
        return field.default
    return field.get_default(call_default_factory=True)


def dry_run(config: TrainConfig, given: UserRows | None = None) -> DryRun:
    """Check a run and predict its passes and memory without reading a weight of the model.

    Args:
        config: the options of the run.
        given: the rows of the config's files, if they have been read; None: they are read first.

    Raises:
        UsageError: the run could not start with this configuration. Rows that are too long are listed instead.
    """
    check_installed(config.report_to)
    schedule_of(config)
    given = read_checked_files(config) if given is None else given
    with FakeScalars():
        lm, stored = load_meta_model(config, head_labels(config))
        num_parameters = sum(p.numel() for p in lm.module.parameters())
        placement = placement_in_plan(config, lm.base, on_cpu=_on_cpu(config))
        if placement is not None:
            check_here(placement, config)
        if (shard := shard_of(config)) == "tp":
            by_plan(lm.base)
        prepare_tuning(lm, config)
        shown, given, stream = _shown_rows(config, given)
        data = load_examples(lm, shown, given)
        if not data.splits.train:
            raise UsageError("there is no row to train on. Give --train-file, or a --data-source with training rows.")
        config = config.model_copy(update={name: getattr(data.options, name) for name in RESOLVED_OPTIONS})
        config = config.model_copy(update=own_options(lm, config))
        rows = EncodedRows(lm, data.options, data)
        num_rows = {name: len(getattr(data.splits, name)) for name in SPLITS}
        if stream is not None:
            rows.count_stream(lm, config, data, stream)
            num_rows["train"] = rows.num_train
        config, notes = with_steps_and_rate(lm, config, rows.num_train)
        ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
        aim, reuses = planned_aim(lm, config), not config.is_generated
        optimizer = make_optimizer(
            lm.module, config, config.seed, lambda: lm.read(ids, ids), reuse_prefix=reuses, aim=aim
        )
        step = forwards_a_step(optimizer, config)
        memory = _memory(lm, optimizer, config, rows, data, stored)
        memory, places = _placed(memory, lm, config, (placement, stored), shard)
        return DryRun(
            config=config,
            notes=(*data.notes, *rows.notes, *notes),
            examples=tuple(rows.shown),
            num_rows=num_rows,
            tokens=quantiles(rows.lengths),
            num_cut=rows.num_cut,
            num_dropped=rows.num_dropped,
            refused=tuple(rows.refused),
            num_tuned=num_free(lm.module, aim),
            num_parameters=num_parameters,
            forward_passes={"step": step, "training": forwards_of_training(step, config, lm.module)},
            memory=memory,
            places=places,
        )


def _placed(
    memory: Memory,
    lm: LanguageModel,
    config: TrainConfig,
    placed: tuple[Placement | None, torch.dtype],
    shard: str | None,
) -> tuple[Memory, Places | Slices | None]:
    """Correct a prediction for a model that lies in several places or processes; returns also what lies where."""
    placement, stored = placed
    if placement is not None:
        return with_placement(memory, placement, tuned_of(lm), config, stored)
    if shard is not None:
        return with_shards(memory, lm.base, tuned_of(lm) if config.is_adapter else [], shard, asked_for())
    return memory, None


def tuned_of(lm: LanguageModel) -> list[Tensor]:
    """The tuned parameters of a model."""
    return [p for p in lm.module.parameters() if p.requires_grad]


def _on_cpu(config: TrainConfig) -> bool:
    return config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())


def _shown_rows(config: TrainConfig, given: UserRows | None) -> tuple[TrainConfig, UserRows | None, RowStreams | None]:
    """Return the options to read the rows by, and the rows; of a stream the first rows, and then all for training."""
    if not config.streaming:
        return config, given, None
    update = {"num_train": None, "num_dev": config.num_dev or 0, "train_file_weights": ()}
    return config.model_copy(update=update), *head_of_files(config)


def _memory(
    lm: LanguageModel, optimizer: Any, config: TrainConfig, rows: EncodedRows, data: Data, stored: torch.dtype
) -> Memory:
    on_cpu = _on_cpu(config)
    base = list(lm.base.parameters())
    is_converted = any(
        p.dtype != stored
        for p in base
        if p.is_floating_point() and (not p.requires_grad or config.tuning in ("full", "head", "norms", "biases"))
    )
    train_rows = [data.objective.reads(e) for e in rows.encoded["train"]]
    eval_rows = [*rows.encoded["dev"], *rows.encoded["test"]]
    if not train_rows:
        raise UsageError("\n".join(rows.refused[:SHOWN_REFUSED]))
    if data.generated is not None:
        train_rows, eval_rows = (
            [generated(e, config.max_new_tokens) for e in split] for split in (train_rows, eval_rows)
        )
    batch = largest_batch(lm, train_rows, config.per_device_train_batch_size, data.objective)
    eval_size = min(config.per_device_eval_batch_size, len(eval_rows))
    eval_batches = [largest_batch(lm, eval_rows, eval_size, data.objective)] if eval_rows else []
    device = "cpu" if on_cpu else "cuda"
    # Probes that generate text do not share a pass.
    most = 1 if config.is_generated else MAX_COPIES
    passes = [largest_pass(lm, optimizer, config, batch, device, most)]
    largest = max([*passes, *(forward(lm, b) for b in eval_batches)], key=lambda one: one.total)
    cache = max(cache_bytes(lm, b.input_ids.numel()) for b in (batch, *eval_batches)) * config.is_generated
    return Memory(
        weights=weight_bytes(lm),
        loading=sum(p.numel() for p in base) * stored.itemsize if is_converted else 0,
        state=state_bytes(optimizer, config),
        gradients=largest.gradients,
        activations=largest.activations + cache,
        scratch=largest.scratch,
        reused=_prompt_cache_bytes(lm, config, rows)
        if config.is_generated
        else _activation_cache_bytes(lm, config, [train_rows, *(rows.encoded[name] for name in ("dev", "test"))])
        + recorded_bytes(lm, batch, config),
        overhead=overhead_bytes(optimizer, device),
        libraries=peak_memory("cpu") if on_cpu else 0,
    )


def _activation_cache_bytes(lm: LanguageModel, config: TrainConfig, splits: Iterable[Sequence[Encoded]]) -> int:
    """Bytes of the cached activations below the tuned layers."""
    sequences = [[s for e in split for s in e.sequences] for split in splits]
    reused = SequenceCache(lm, ActivationStore(), sequences)
    if not reused.depth or not config.reuse_activations:
        return 0
    return min(reused.num_bytes, int(config.reuse_memory * 2**30))


def _prompt_cache_bytes(lm: LanguageModel, config: TrainConfig, rows: EncodedRows) -> int:
    """Bytes that are cached of prompts: keys and values below the tuned layers, and the input of the first of these."""
    depth = PromptCache(lm, ActivationStore()).depth
    if not depth or not config.reuse_activations:
        return 0
    num_tokens = sum(map(len, {e.prompt for encoded in rows.encoded.values() for e in encoded}))
    inputs: int = num_tokens * int(lm.config.get_text_config().hidden_size) * lm.base.dtype.itemsize
    return min(inputs + cache_bytes(lm, num_tokens, depth), int(config.reuse_memory * 2**30))
