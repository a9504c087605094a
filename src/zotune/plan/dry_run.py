"""`zotune train --dry-run`: the data, the tuned parameters and the memory of a run, without starting or writing it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from zotune.errors import UsageError
from zotune.llm.callbacks.trackers import check_installed
from zotune.llm.config.data import DataOptions
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoded, Encoder, LongRowError, check_distinct
from zotune.llm.models.activation_cache import SequenceCache
from zotune.llm.models.activation_storage.tiers import ActivationStore
from zotune.llm.models.continued_adapter import own_options
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.meta_model import load_meta_model
from zotune.llm.models.placement.device_map import check_here
from zotune.llm.models.prompt_cache import PromptCache
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.models.tuned_sets.aim import num_free
from zotune.llm.models.tuned_sets.find import planned_aim
from zotune.llm.rows.sources import RowStreams, UserRows, read_checked_files
from zotune.llm.tasks import head_labels
from zotune.llm.tasks.load_data import encode_rows, encoder_of, load_examples
from zotune.llm.tasks.streaming import count_rows, head_of_files
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
from zotune.plan.placed import Places, mib, placement_in_plan, with_placement
from zotune.system.peak_memory import peak_memory

SHOWN_EXAMPLES, SHOWN_CHARACTERS, SHOWN_REFUSED = 3, 2000, 5
SPLITS = ("train", "dev", "test")


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
        places: where the weights lie, if not all on one device.
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
    places: Places | None = None

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        plain = {k: v for k, v in vars(self).items() if k not in ("config", "memory", "places")}
        places = {} if self.places is None else {"places": self.places.to_json()}
        return {"config": self.config.model_dump(mode="json"), **plain, "memory": self.memory.to_json(), **places}

    def __str__(self) -> str:
        recipe = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
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
                recipe,
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
        prepare_tuning(lm, config)
        shown, given, stream = _shown_rows(config, given)
        data = load_examples(lm, shown, given)
        if not data.splits.train:
            raise UsageError("there is no row to train on. Give --train-file, or a --data-source with training rows.")
        config = config.model_copy(update={name: getattr(data.options, name) for name in RESOLVED_OPTIONS})
        config = config.model_copy(update=own_options(lm, config))
        rows = _EncodedRows(lm, data.options, data)
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
        memory, places = _memory(lm, optimizer, config, rows, data, stored), None
        if placement is not None:
            memory, places = with_placement(memory, placement, tuned_of(lm), config)
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


class _EncodedRows:
    """The rows of all splits as tokens, and the reasons for rows that are refused."""

    def __init__(self, lm: LanguageModel, config: DataOptions, data: Data) -> None:
        self._encode, self._drops = encoder_of(lm, config), config.long_rows == "drop"
        self._whole = Encoder(
            lm.tokenizer, masked=lm.masked, context=1 << 60, max_length=None, classifies=lm.classifies
        )
        self.encoded: dict[str, list[Encoded]] = {}
        self.lengths: list[int] = []
        self.refused: list[str] = []
        self.shown: list[str] = []
        self.num_cut = self.num_dropped = 0
        self.notes: tuple[str, ...] = ()
        if config.packing:
            self._read_windows(lm, config, data)
            return
        for name in SPLITS:
            examples: tuple[Example, ...] = getattr(data.splits, name)
            if name == "test" and examples == data.splits.dev:
                self.encoded[name] = self.encoded["dev"]
                continue
            every = [self._encode_row(e, e.place or f"{name} row {i}") for i, e in enumerate(examples, start=1)]
            self.encoded[name] = [encoded for encoded in every if encoded is not None]
            if name == "train":
                self.num_train = len(examples) - self.num_dropped
                pairs = [(e, x) for e, x in zip(examples, every, strict=True) if x is not None][:SHOWN_EXAMPLES]
                self.shown = [marked_text(lm, e, x) for e, x in pairs]

    def _read_windows(self, lm: LanguageModel, config: DataOptions, data: Data) -> None:
        """Read plain texts as the windows that packing makes of them."""
        rows = encode_rows(lm, config, data)
        self.notes, self.num_train = rows.notes[len(data.notes) :], len(rows.train)
        self.encoded = {name: list(getattr(rows, name)) for name in SPLITS}
        self.lengths = [e.length for encoded in self.encoded.values() for e in encoded]
        self.shown = [marked_text(lm, data.splits.train[0], e) for e in rows.train[:SHOWN_EXAMPLES]]

    def count_stream(self, lm: LanguageModel, config: DataOptions, data: Data, stream: RowStreams) -> None:
        """Count the training rows of a stream, of which only the first ones are in `data`."""
        assert data.to_example is not None
        of_first = self.num_train
        self.num_train = count_rows(encoder_of(lm, config), stream, data.to_example, config)
        if self.num_train > of_first:
            first = f"the first {len(data.splits.train)} rows stand for all, except for their number (streaming)"
            self.notes += (f"{stream.source}: {first}",)

    def _encode_row(self, example: Example, where: str) -> Encoded | None:
        try:
            whole = self._whole(example, where)
            self.lengths.append(whole.length)
            encoded = self._encode(example, where)
            if example.place:
                check_distinct(encoded, example)
        except LongRowError as error:
            self.num_dropped += self._drops
            self.refused += [] if self._drops else [str(error)]
            return None
        except UsageError as error:
            self.refused.append(str(error))
            return None
        self.num_cut += encoded.sequences != whole.sequences or encoded.prompt != whole.prompt
        return encoded


def _memory(
    lm: LanguageModel, optimizer: Any, config: TrainConfig, rows: _EncodedRows, data: Data, stored: torch.dtype
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


def _prompt_cache_bytes(lm: LanguageModel, config: TrainConfig, rows: _EncodedRows) -> int:
    """Bytes that are cached of prompts: keys and values below the tuned layers, and the input of the first of these."""
    depth = PromptCache(lm, ActivationStore()).depth
    if not depth or not config.reuse_activations:
        return 0
    num_tokens = sum(map(len, {e.prompt for encoded in rows.encoded.values() for e in encoded}))
    inputs: int = num_tokens * int(lm.config.get_text_config().hidden_size) * lm.base.dtype.itemsize
    return min(inputs + cache_bytes(lm, num_tokens, depth), int(config.reuse_memory * 2**30))


def marked_text(lm: LanguageModel, example: Example, encoded: Encoded) -> str:
    """An example as the model reads it, decoded from its tokens, with the scored text in ⟦ ⟧.

    The right candidate stands in its place; the others follow, each behind a bar. A prompt for generated text has an
    empty ⟦⟧, followed by the reference answers.
    """
    if not encoded.candidates:
        prompt = _shortened(lm.tokenizer.decode(list(encoded.prompt)))
        return f"{prompt}⟦⟧" + "".join(f" | {answer}" for answer in example.answers)
    if lm.classifies:
        texts = [example.prompt, *([example.second] if example.second else [])]
        return f"{_shortened(' / '.join(texts))} ⟦{example.candidates[example.label]}⟧"
    others = [c for i, c in enumerate(encoded.candidates) if i != encoded.label]
    right = encoded.candidates[encoded.label]
    tokens: list[int | None] = [*encoded.sequences[right.sequence], *([] if lm.masked else [None])]
    places = [p + (not lm.masked) for p in right.positions]
    for place, token in zip(places, right.tokens, strict=True):
        tokens[place] = token
    runs = groupby(range(len(tokens)), key=set(places).__contains__)
    parts = [(is_scored, lm.tokenizer.decode([tokens[i] for i in run])) for is_scored, run in runs]
    text = "".join(f"⟦{part}⟧" if is_scored else _shortened(part) for is_scored, part in parts)
    return text + "".join(f" | ⟦{lm.tokenizer.decode(list(c.tokens))}⟧" for c in others)


def _shortened(text: str) -> str:
    over = len(text) - SHOWN_CHARACTERS
    if over <= 0:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} [… {over} characters …] {text[-half:]}"


def quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """The minimum, median, 95th percentile and maximum; all but the median are values of the list.

    >>> quantiles([3, 1, 2, 10])
    {'min': 1, 'median': 2.5, 'p95': 10, 'max': 10}
    """
    if not lengths:
        return {}
    p95 = int(np.percentile(lengths, 95, method="higher"))
    return {"min": min(lengths), "median": float(np.median(lengths)), "p95": p95, "max": max(lengths)}
