"""`zotune train --dry-run`: what a run would read, tune and take. It starts nothing and writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import yaml

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoded, Encoder, check_distinct
from zotune.llm.models.activation_cache import SequenceCache
from zotune.llm.models.cache_storage import ActivationStore
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.meta_model import load_meta_model
from zotune.llm.models.prompt_cache import PromptCache
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.tasks import head_labels
from zotune.llm.tasks.load_data import encoder_of, load_examples
from zotune.llm.tasks.user_data import RESOLVED_OPTIONS, Data
from zotune.llm.training.optimizers import make_optimizer
from zotune.plan.live_memory import Assumed
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
from zotune.plan.passes import forward, largest_pass
from zotune.system.peak_memory import peak_memory

SHOWN_EXAMPLES, SHOWN_CHARACTERS, SHOWN_REFUSED = 3, 2000, 5
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class DryRun:
    """What is known of a run before it starts.

    Attributes:
        config: the resolved recipe.
        notes: what was told from one's own rows.
        examples: some training rows as the model reads them, what is scored in ⟦ ⟧.
        num_rows: of each split.
        tokens: of all rows, the longest candidate each: min, median, p95 (the 95th percentile) and max, uncut.
        num_cut: rows that --max-length cuts.
        refused: rows that the run would refuse, with the reason.
        num_tuned, num_parameters: numbers that are tuned, and of the model in all.
        forward_passes: of one step, and of the training.
        memory: by what it is for.
    """

    config: TrainConfig
    notes: tuple[str, ...]
    examples: tuple[str, ...]
    num_rows: dict[str, int]
    tokens: dict[str, float]
    num_cut: int
    refused: tuple[str, ...]
    num_tuned: int
    num_parameters: int
    forward_passes: dict[str, int]
    memory: Memory

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        plain = {k: v for k, v in vars(self).items() if k not in ("config", "memory")}
        return {"config": self.config.model_dump(mode="json"), **plain, "memory": self.memory.to_json()}

    def __str__(self) -> str:
        recipe = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        shown = "\n\n".join(f"example {i}: {text}" for i, text in enumerate(self.examples, start=1))
        rows = "{train} to train on, {dev} held out, {test} to evaluate on".format_map(self.num_rows)
        tokens = ", ".join(f"{name} {n:g}" for name, n in self.tokens.items())
        refused = [f"refused: {reason}" for reason in self.refused[:SHOWN_REFUSED]]
        if len(self.refused) > SHOWN_REFUSED:
            refused.append(f"refused: {len(self.refused) - SHOWN_REFUSED} more")
        parts = [f"{name} {_mib(n)}" for name, n in asdict(self.memory).items() if n]
        return "\n".join(
            [
                recipe,
                *self.notes,
                "",
                f"What is scored is in ⟦ ⟧.\n\n{shown}\n",
                f"rows: {rows}",
                f"tokens a row: {tokens}; cut: {self.num_cut}; refused: {len(self.refused)}",
                *refused,
                f"tuned: {self.num_tuned:,} of {self.num_parameters:,} numbers",
                f"forward passes: {self.forward_passes['step']:,} a step, {self.forward_passes['training']:,} in all",
                f"memory expected: {_mib(self.memory.total)} ({', '.join(parts)})",
            ]
        )


def dry_run(config: TrainConfig) -> DryRun:
    """All that can be known of a run without a weight of the model.

    Raises:
        UsageError: the run could not start as asked. Rows that are merely too long are listed instead.
    """
    with Assumed():
        lm, stored = load_meta_model(config, head_labels(config))
        num_parameters = sum(p.numel() for p in lm.module.parameters())
        prepare_tuning(lm, config)
        data = load_examples(lm, config)
        if not data.splits.train:
            raise UsageError("there is no row to train on: give --train-file, or --data-source with training rows.")
        config = config.model_copy(update={name: getattr(data.options, name) for name in RESOLVED_OPTIONS})
        read = _Reading(lm, config, data)
        ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
        optimizer = make_optimizer(
            lm.module, config, config.seed, lambda: lm.read(ids, ids), reuse_prefix=not config.is_generated
        )
        step = forwards_a_step(optimizer, config)
        return DryRun(
            config=config,
            notes=data.notes,
            examples=tuple(read.shown),
            num_rows={name: len(getattr(data.splits, name)) for name in SPLITS},
            tokens=quantiles(read.lengths),
            num_cut=read.num_cut,
            refused=tuple(read.refused),
            num_tuned=sum(p.numel() for p in lm.module.parameters() if p.requires_grad),
            num_parameters=num_parameters,
            forward_passes={"step": step, "training": forwards_of_training(step, config)},
            memory=_memory(lm, optimizer, config, read, data, stored),
        )


class _Reading:
    """The rows as tokens: those that can be read, and what is to be said of the others."""

    def __init__(self, lm: LanguageModel, config: DataOptions, data: Data) -> None:
        self._encode = encoder_of(lm, config)
        self._whole = Encoder(
            lm.tokenizer, masked=lm.masked, context=1 << 60, max_length=None, classifies=lm.classifies
        )
        self.encoded: dict[str, list[Encoded]] = {}
        self.lengths: list[int] = []
        self.refused: list[str] = []
        self.shown: list[str] = []
        self.num_cut = 0
        for name in SPLITS:
            examples: tuple[Example, ...] = getattr(data.splits, name)
            if name == "test" and examples == data.splits.dev:
                self.encoded[name] = self.encoded["dev"]
                continue
            both = [self._read(e, e.place or f"{name} row {i}") for i, e in enumerate(examples, start=1)]
            self.encoded[name] = [encoded for encoded in both if encoded is not None]
            if name == "train":
                pairs = [(e, x) for e, x in zip(examples, both, strict=True) if x is not None][:SHOWN_EXAMPLES]
                self.shown = [shown(lm, e, x) for e, x in pairs]

    def _read(self, example: Example, where: str) -> Encoded | None:
        try:
            whole = self._whole(example, where)
            self.lengths.append(whole.length)
            encoded = self._encode(example, where)
            if example.place:
                check_distinct(encoded, example)
        except UsageError as error:
            self.refused.append(str(error))
            return None
        self.num_cut += encoded.sequences != whole.sequences or encoded.prompt != whole.prompt
        return encoded


def _memory(
    lm: LanguageModel, optimizer: Any, config: TrainConfig, read: _Reading, data: Data, stored: torch.dtype
) -> Memory:
    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    base = list(lm.base.parameters())
    is_other = any(
        p.dtype != stored
        for p in base
        if p.is_floating_point() and (not p.requires_grad or config.tuning in ("full", "head"))
    )
    trained = [data.objective.reads(e) for e in read.encoded["train"]]
    measured = [*read.encoded["dev"], *read.encoded["test"]]
    if not trained:
        raise UsageError("\n".join(read.refused[:SHOWN_REFUSED]))
    if data.generated is not None:
        trained, measured = ([generated(e, config.max_new_tokens) for e in some] for some in (trained, measured))
    batch = largest_batch(lm, trained, config.per_device_train_batch_size, data.objective)
    eval_size = min(config.per_device_eval_batch_size, len(measured))
    evaluated = [largest_batch(lm, measured, eval_size, data.objective)] if measured else []
    # Generating, no two probes share a pass.
    copies = (lambda _: batch(1)) if config.is_generated else batch
    device = "cpu" if on_cpu else "cuda"
    passes = [largest_pass(lm, optimizer, config, copies, device)]
    takes = max([*passes, *(forward(lm, b(1)) for b in evaluated)], key=lambda found: found.total)
    cache = max(cache_bytes(lm, b(1).input_ids.numel()) for b in (batch, *evaluated)) * config.is_generated
    return Memory(
        weights=weight_bytes(lm),
        loading=sum(p.numel() for p in base) * stored.itemsize if is_other else 0,
        state=state_bytes(optimizer, config),
        gradients=takes.gradients,
        activations=takes.activations + cache,
        scratch=takes.scratch,
        reused=_prompts_reused(lm, config, read)
        if config.is_generated
        else _reused(lm, config, [trained, *(read.encoded[name] for name in ("dev", "test"))])
        + recorded_bytes(lm, batch(1), config),
        overhead=overhead_bytes(optimizer, device),
        libraries=peak_memory("cpu") if on_cpu else 0,
    )


def _reused(lm: LanguageModel, config: TrainConfig, splits: Iterable[Sequence[Encoded]]) -> int:
    """Bytes of activations below the tuned layers that are kept in memory."""
    sequences = [[s for e in split for s in e.sequences] for split in splits]
    reused = SequenceCache(lm, ActivationStore(), sequences)
    if not reused.depth or not config.reuse_activations:
        return 0
    return min(reused.num_bytes, int(config.reuse_memory * 2**30))


def _prompts_reused(lm: LanguageModel, config: TrainConfig, read: _Reading) -> int:
    """Bytes of what prompts leave below the tuned layers: keys, values, and what enters the first of these."""
    depth = PromptCache(lm, ActivationStore()).depth
    if not depth or not config.reuse_activations:
        return 0
    num_tokens = sum(map(len, {e.prompt for encoded in read.encoded.values() for e in encoded}))
    entering: int = num_tokens * int(lm.config.hidden_size) * lm.base.dtype.itemsize
    return min(entering + cache_bytes(lm, num_tokens, depth), int(config.reuse_memory * 2**30))


def shown(lm: LanguageModel, example: Example, encoded: Encoded) -> str:
    """An example as the model reads it, decoded from its tokens, with what is scored in ⟦ ⟧.

    The right candidate in its place; the others behind it, each after a bar. Of a prompt that text is generated from,
    an empty place, and behind it what the text is compared with.
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
    """The least, the median, the 95th percentile and the most; each (but the median) one of the values.

    >>> quantiles([3, 1, 2, 10])
    {'min': 1, 'median': 2.5, 'p95': 10, 'max': 10}
    """
    if not lengths:
        return {}
    p95 = int(np.percentile(lengths, 95, method="higher"))
    return {"min": min(lengths), "median": float(np.median(lengths)), "p95": p95, "max": max(lengths)}


def _mib(n: int) -> str:
    return f"{n / 2**20:.0f} MiB" if n < 2**33 else f"{n / 2**30:.1f} GiB"
