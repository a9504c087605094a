"""A model of transformers with its tokenizer, and the forward passes in which zotune reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zotune.estimate.mesh import ALONE_MESH, Mesh
from zotune.llm.checkpoints.model_kind import kind_of
from zotune.llm.data.collator import Batch
from zotune.llm.data.control_tokens import control_tokens
from zotune.llm.data.padding import by_length, generates_padded, reads_padded, reset_rope, rope_grows
from zotune.llm.models.candidate_scores import (
    RowsAlone,
    check_rows_alone,
    log_probabilities,
    losses,
    scores_of_single_tokens,
    scores_of_tokens,
)
from zotune.llm.models.partial_forward import fixed_output, head_at_positions, modules_entered, output_of_module
from zotune.llm.models.tuned_sets.aim import Aim
from zotune.llm.quantized.backends import supports_row_lookup
from zotune.messages import say
from zotune.model.parameters import input_device
from zotune.model.shards import is_tensor_parallel, reshard
from zotune.model.streaming import stream_of

# Logits computed at a time at most: 64 MiB in float32.
MAX_LOGITS = 1 << 24
# Tokens up to which copies of a batch share a forward pass; with more tokens this saves little time and costs memory.
MAX_TOKENS = 1 << 10


@dataclass
class LanguageModel:
    """A model of transformers with its tokenizer, and the forward passes that zotune runs on it.

    Attributes:
        module: a causal or masked language model of transformers, possibly wrapped by peft.
        masked: whether it is bidirectional: it fills in masks or classifies whole sequences, and does not continue
            text.
        classifies: whether it has a classification head in place of a language-modelling head.
        num_forwards: forward passes so far.
        base_fingerprint: what identifies the weights of the base model, once an adapter or tuned tensors are beside
            it.
        mesh: the processes that share the work on the model; one by default.
        rows_alone: how `score` computes each row alone; None to compute all rows together.
        aim: what was found for the tuned set before the first step; None for a set that needs nothing.
        only_layer: the layer that was found to be dominant, and is the only one that is tuned; None if none was sought.
        companions: files of the model's processor by name, to save beside a model that also reads images or sound.
    """

    module: nn.Module
    tokenizer: Any
    name: str
    masked: bool
    num_forwards: int = field(default=0)
    classifies: bool = False
    base_fingerprint: dict[str, str] | None = None
    companions: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    mesh: Mesh = field(default=ALONE_MESH, repr=False)
    aim: Aim | None = field(default=None, repr=False)
    only_layer: int | None = field(default=None, repr=False)
    rows_alone: RowsAlone | None = field(default=None, repr=False)
    _said: bool = field(default=False, repr=False)

    @property
    def config(self) -> Any:
        """The configuration of transformers."""
        return self.base.config

    @property
    def base(self) -> Any:
        """The model of transformers itself, without an adapter around it."""
        get_base = getattr(self.module, "get_base_model", None)
        return self.module if get_base is None else get_base()

    @property
    def auto_class_name(self) -> str:
        """The name of the class of transformers that loads the base model by its configuration."""
        return kind_of(self.config, self.name, type(self.base).__name__).auto_name

    @property
    def text_model(self) -> Any:
        """The part of the model that reads text: the model itself, unless it also has parts of other kinds."""
        is_composite = self.config.get_text_config() is not self.config
        return self.base.get_decoder() if is_composite else self.base

    @property
    def device(self) -> torch.device:
        """The device of the first weights; of offloaded ones that on which they are used."""
        return input_device(self.module)

    @property
    def context(self) -> int:
        """The maximum number of input tokens."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        limit = 1 << 30 if limit is None else int(limit)  # relative positions have no limit
        # In the family of RoBERTa positions begin after the padding index, which the table of positions names.
        tables = [m for name, m in self.base.named_modules() if name.endswith("position_embeddings")]
        starts = [int(m.padding_idx) + 1 for m in tables if getattr(m, "padding_idx", None) is not None]
        return limit - max(starts, default=0) - self.num_virtual_tokens

    @property
    def num_virtual_tokens(self) -> int:
        """The positions that a prefix or prompt occupies before each sequence."""
        adapter: Any = getattr(self.module, "active_peft_config", None)
        return int(adapter.num_virtual_tokens) if getattr(adapter, "is_prompt_learning", False) else 0

    def __post_init__(self) -> None:
        # A model that classifies by its last token finds it by its configuration's padding token.
        if self.classifies and self.config.pad_token_id is None:
            self.config.pad_token_id = self.pad_token_id

    @property
    def pad_token_id(self) -> int:
        """The padding token; any token with an embedding will do, because padding is on the right or masked.

        Where a classifier looks for the last token that is not padding, it must not be what ends each text.
        """
        t = self.tokenizer
        behind = {t("a")["input_ids"][-1]} if self.classifies and t.pad_token_id is None else set()
        known = (t.pad_token_id, t.eos_token_id, t.unk_token_id, t.bos_token_id, 0, 1)
        return int(next(i for i in known if i is not None and i < self.num_embeddings and i not in behind))

    @property
    def num_embeddings(self) -> int:
        """The number of tokens that the model has embeddings for."""
        embeddings = self.base.get_input_embeddings()
        rows = getattr(embeddings, "num_embeddings", None)
        return int(self.config.get_text_config().vocab_size if rows is None else rows)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens at which generated text ends: the tokenizer's, and all that the checkpoint names.

        Without a generation configuration of the checkpoint, its place is taken by the model's configuration, whose
        token may be no more than the default of its class: that counts only if the tokenizer knows it as special.
        """
        named = getattr(self.base, "generation_config", None)
        ids = getattr(named, "eos_token_id", None)
        ends = {int(i) for i in (ids if isinstance(ids, list | tuple) else [ids]) if i is not None}
        if getattr(named, "_from_model_config", False):
            default = getattr(type(self.config.get_text_config()), "eos_token_id", None)
            special = control_tokens(self.tokenizer).ids.values()
            ends = {i for i in ends if i != default or i in special}
        own = self.tokenizer.eos_token_id
        return frozenset(ends if own is None else ends | {own})

    def reset(self) -> None:
        """Forget what the model keeps from one pass to the next: the frequencies of the longest row so far, and weights
        that FSDP2 has gathered, for these may have been restored since.
        """
        if self.mesh.is_sharded:
            reshard(self.base)
        if rope_grows(self.config):
            reset_rope(self.base)

    def reads_padded(self, longest: int) -> bool:
        """Whether sequences of at most `longest` tokens may share a pass, with padding on the right."""
        bidirectional = self.masked or self.classifies
        return reads_padded(self.config, longest + self.num_virtual_tokens, masked=bidirectional)

    def generates_padded(self, longest: int) -> bool:
        """Whether prompts may share a batch, with padding on the left, up to `longest` tokens with the new text."""
        return not self.num_virtual_tokens and generates_padded(self.config, longest)

    def logits(self, batch: Batch, only: Tensor | None = None) -> Tensor:
        """Return the (N, V) logits at the batch's scored positions, or (N, K) logits of the tokens `only`.

        For a classification head the labels take the place of the vocabulary, with one scored position per sequence.
        """
        self.num_forwards += 1
        if self.classifies:
            return self.read(batch.input_ids, batch.attention_mask)
        with head_at_positions(self.base, batch, only):
            return self.read(batch.input_ids, batch.attention_mask)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits of a forward pass over (S, L) tokens, padded on the right."""
        self.reset()
        return self.read_with(self.module, input_ids, attention_mask)

    def read_with(self, module: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """As `read`, by another model of the same kind; without a mask nothing is padded."""
        if attention_mask is None:
            input_ids = input_ids.to(input_device(module))
            attention_mask = torch.ones_like(input_ids)
        inputs: dict[str, Any] = {"input_ids": input_ids}
        # Causal attention never sees right padding, and without a mask attention runs its fast kernel.
        bidirectional = self.masked or self.classifies
        inputs |= {"attention_mask": attention_mask} if bidirectional else {"use_cache": False}
        out: Tensor = module(**inputs).logits
        return out

    def score(self, batch: Batch) -> Tensor:
        """Return (examples, candidates) scores in float64.

        They are mean log-probabilities, or these up to a constant per example where the batch does not need them
        exactly. Where padding might change them, sequences of one length share a pass. While `rows_alone` is set:
        (points, examples, candidates).
        """
        if self.rows_alone is not None:
            return self._scores_of_rows(batch, self.rows_alone)
        if not self._may_share(batch):
            return scores_of_tokens(self._log_probabilities_by_length(batch), batch)
        if self.classifies:
            return scores_of_tokens(log_probabilities(self.logits(batch), batch.rows, batch.tokens), batch)
        if batch.needs_only_candidates and self._looks_up_rows:
            return scores_of_single_tokens(self.logits(batch, batch.distinct[0]), batch)
        return scores_of_tokens(self.token_log_probabilities(batch), batch)

    @property
    def _looks_up_rows(self) -> bool:
        """Whether rows of the output layer can be read alone: not where each process holds other ones."""
        return not is_tensor_parallel(self.base) and supports_row_lookup(self.base.get_output_embeddings())

    def _scores_of_rows(self, batch: Batch, alone: RowsAlone) -> Tensor:
        """Return the (points, examples, candidates) scores of rows that meet their own weights."""
        causal = not self.masked and not self.classifies
        check_rows_alone(causal=causal, padded=self._may_share(batch), virtual_tokens=self.num_virtual_tokens > 0)
        looks_up = batch.needs_only_candidates and self._looks_up_rows
        only = batch.distinct[0] if looks_up else None
        before = self.num_forwards
        found = alone.scores(batch, self.logits, only, MAX_LOGITS // self.vocabulary)
        self.num_forwards = before + len(found)
        return found

    def _may_share(self, batch: Batch) -> bool:
        """Whether the batch's sequences may share a pass: padding changes nothing, or nothing depends on lengths."""
        return self.reads_padded(batch.input_ids.shape[1])

    def _log_probabilities_by_length(self, batch: Batch) -> Tensor:
        """Return the (M,) log-probabilities from passes over sequences of one length, which count as one."""
        before, parts, places = self.num_forwards, [], []
        for part, at in by_length(batch):
            if self.classifies:
                parts.append(log_probabilities(self.logits(part), part.rows, part.tokens))
            else:
                parts.append(self.token_log_probabilities(part))
            places.append(at)
        if len(parts) > 1 and not self._said:
            self._said = True
            say(f"rows of one length share a pass, because padding might change the results of {self._kind}")
        self.num_forwards = before + 1
        return torch.cat(parts)[torch.cat(places).argsort()]

    @property
    def _kind(self) -> str:
        return f"{self.config.model_type} models with rows of this length"

    def token_log_probabilities(self, batch: Batch) -> Tensor:
        """Return the (M,) log-probabilities of the candidates' tokens.

        The body runs once, the head on a bounded number of positions at a time.
        """
        at_once = max(1, MAX_LOGITS // self.vocabulary)
        # A pass of a model in shards is not broken off: its processes would wait for each other.
        if len(batch.positions) <= at_once or self.mesh.is_sharded:
            return log_probabilities(self.logits(batch), batch.rows, batch.tokens)
        # The first submodule entered: for OPT the decoder inside `base_model`, not `base_model` itself.
        body = modules_entered(self.base, lambda module: module is not self.base)[-1]
        output = output_of_module(body, lambda: self.logits(batch))
        parts, indices = [], []
        for lo in range(0, len(batch.positions), at_once):
            here = ((batch.rows >= lo) & (batch.rows < lo + at_once)).nonzero()[:, 0]
            part = partial(self._part, replace(batch, positions=batch.positions[lo : lo + at_once]), body, output)
            rows, tokens = batch.rows[here] - lo, batch.tokens[here]
            # Under autograd the logits of a part are recomputed in the backward pass, so that not all of them are
            # stored.
            compute = partial(checkpoint, part, use_reentrant=False) if torch.is_grad_enabled() else part
            parts.append(compute(rows, tokens))
            indices.append(here)
        return torch.cat(parts)[torch.cat(indices).argsort()]

    def copies_at_once(self, batch: Batch) -> int:
        """How many copies of a batch one forward pass may score, within the bounds on tokens and on logits."""
        if not self._may_share(batch):
            return 1
        positions = max(1, len(batch.positions))
        at_once = MAX_TOKENS // batch.input_ids.numel()
        stream = stream_of(self.module)
        if stream is not None and stream.device.type != "cpu":
            # Both ends of a probe share one copy of each layer to the device, which costs more than computing.
            at_once = max(2, at_once)
        return max(1, min(at_once, MAX_LOGITS // self.vocabulary // positions))

    @property
    def vocabulary(self) -> int:
        """The number of rows of the output layer."""
        # A wrapper of peft around the layer may not know its size.
        rows = getattr(self.base.get_output_embeddings(), "out_features", None)
        return int(self.config.get_text_config().vocab_size if rows is None else rows)

    def _part(self, batch: Batch, body: nn.Module, output: Any, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return log-probabilities at some of the positions, from the output of the body."""
        with fixed_output(body, output):
            logits = self.logits(batch)
        self.num_forwards -= 1
        return log_probabilities(logits, rows, tokens)

    def losses(self, batch: Batch) -> Tensor:
        """Return the (examples,) losses in float64."""
        return losses(self.score(batch), batch)
