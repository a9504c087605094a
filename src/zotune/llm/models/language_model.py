"""A model of transformers with its tokenizer, and the forward passes in which zotune reads it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zotune.llm.data.collator import Batch
from zotune.llm.models.logprobs import log_probabilities, losses, scores_of_single_tokens, scores_of_tokens
from zotune.llm.models.partial_forward import entered, giving, head_at, output_of
from zotune.llm.quantized.backends import gives_rows

# Logits that are made at a time: 64 MiB in float32.
MAX_LOGITS = 1 << 24
# Tokens up to which copies of a batch are read at once: beyond, it saves little time and takes memory.
MAX_TOKENS = 1 << 10


@dataclass
class LanguageModel:
    """A model of transformers with its tokenizer, and how zotune reads it.

    Attributes:
        module: a causal or masked language model of transformers, possibly wrapped by peft.
        masked: whether it fills in masks, or reads whole sequences, rather than continues text.
        classifies: whether it has a classification head in place of a vocabulary.
        num_forwards: forward passes so far.
    """

    module: nn.Module
    tokenizer: Any
    name: str
    masked: bool
    num_forwards: int = field(default=0)
    classifies: bool = False

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
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(p.device for p in self.module.parameters())

    @property
    def context(self) -> int:
        """How many tokens the model reads at most."""
        limit = int(getattr(self.config, "max_position_embeddings", 1 << 30)) - self.num_virtual_tokens
        # RoBERTa's positions begin after its padding index.
        return limit - self.config.pad_token_id - 1 if self.config.model_type == "roberta" else limit

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that a prefix or prompt takes before each sequence."""
        adapter: Any = getattr(self.module, "active_peft_config", None)
        return int(adapter.num_virtual_tokens) if getattr(adapter, "is_prompt_learning", False) else 0

    @property
    def pad_token_id(self) -> int:
        """Any token does: padding is on the right, or masked."""
        return int(next(t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if t is not None))

    def logits(self, batch: Batch, only: Tensor | None = None) -> Tensor:
        """(N, V) logits at the batch's scored positions; (N, K) of the tokens `only`, where given.

        A classification head's labels are its vocabulary, and each sequence is scored at one position.
        """
        self.num_forwards += 1
        if self.classifies:
            return self.read(batch.input_ids, batch.attention_mask)
        with head_at(self.base, batch, only):
            return self.read(batch.input_ids, batch.attention_mask)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits of a forward pass of (S, L) tokens, padded on the right."""
        inputs: dict[str, Any] = {"input_ids": input_ids}
        # Right padding is invisible to causal attention, and without a mask attention runs its fast kernel.
        whole = self.masked or self.classifies
        inputs |= {"attention_mask": attention_mask} if whole else {"use_cache": False}
        out: Tensor = self.module(**inputs).logits
        return out

    def score(self, batch: Batch) -> Tensor:
        """(examples, candidates) scores, float64: mean log-probabilities, or the same up to a constant an example."""
        if self.classifies:
            return scores_of_tokens(log_probabilities(self.logits(batch), batch.rows, batch.tokens), batch)
        if batch.needs_only_candidates and gives_rows(self.base.get_output_embeddings()):
            return scores_of_single_tokens(self.logits(batch, batch.distinct[0]), batch)
        return scores_of_tokens(self.token_log_probabilities(batch), batch)

    def token_log_probabilities(self, batch: Batch) -> Tensor:
        """(M,) of the candidates' tokens. The body runs once, the head for a bounded number of positions at a time."""
        at_once = max(1, MAX_LOGITS // self.vocabulary)
        if len(batch.positions) <= at_once:
            return log_probabilities(self.logits(batch), batch.rows, batch.tokens)
        # The part that is entered first: for OPT that is not `base_model` but the decoder within it.
        body = entered(self.base, lambda module: module is not self.base)[-1]
        output = output_of(body, lambda: self.logits(batch))
        parts, found = [], []
        for lo in range(0, len(batch.positions), at_once):
            here = ((batch.rows >= lo) & (batch.rows < lo + at_once)).nonzero()[:, 0]
            part = partial(self._part, replace(batch, positions=batch.positions[lo : lo + at_once]), body, output)
            rows, tokens = batch.rows[here] - lo, batch.tokens[here]
            # Under autograd a part's logits are made again for its gradient, or all of them would be kept.
            again = partial(checkpoint, part, use_reentrant=False) if torch.is_grad_enabled() else part
            parts.append(again(rows, tokens))
            found.append(here)
        return torch.cat(parts)[torch.cat(found).argsort()]

    def copies_at_once(self, batch: Batch) -> int:
        """How many copies of a batch may be scored in one pass; they are not mixed, for the head sees all at once."""
        positions = max(1, len(batch.positions))
        return max(1, min(MAX_TOKENS // batch.input_ids.numel(), MAX_LOGITS // self.vocabulary // positions))

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer."""
        output = self.base.get_output_embeddings()
        return int(self.config.vocab_size if output is None else output.out_features)

    def _part(self, batch: Batch, body: nn.Module, output: Any, rows: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities at some of the positions, from what the body gave."""
        with giving(body, output):
            logits = self.logits(batch)
        self.num_forwards -= 1
        return log_probabilities(logits, rows, tokens)

    def losses(self, batch: Batch) -> Tensor:
        """(examples,) losses, float64."""
        return losses(self.score(batch), batch)
