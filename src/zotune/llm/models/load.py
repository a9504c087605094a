"""Models by name: the built-in one, a Hub id, a local folder, or a known architecture with random weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.run import ModelOptions
from zotune.llm.data.tokenization import Batch
from zotune.llm.models.builtin import BUILT_IN, fetch, fetch_gguf
from zotune.llm.models.cache_argument import accept_old_name
from zotune.llm.models.classification_head import check_labels, with_head
from zotune.llm.models.partial_forward import entered, output_of
from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer
from zotune.llm.models.scored_positions import giving, head_at
from zotune.llm.quantized.backends import (
    check_head,
    check_quantization,
    gives_rows,
    keep_scales,
    quantised_on_load,
    saved_quantization,
)
from zotune.llm.quantized.gguf_model import read_model
from zotune.llm.quantized.gguf_output import base_of_tuned, put_tuned
from zotune.llm.scoring.objectives import log_probabilities, losses, scores_of_single_tokens, scores_of_tokens
from zotune.messages import say

# Logits that are made at a time: 64 MiB in float32.
MAX_LOGITS = 1 << 24
# Tokens up to which copies of a batch are read at once: beyond, it saves little time and takes memory.
MAX_TOKENS = 1 << 10

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def load(options: ModelOptions, labels: Sequence[str] = (), seed: int = 0) -> LanguageModel:
    """The model that `options` name, in eval mode, on its device.

    Args:
        options: which model.
        labels: where given, a masked language model gets a classification head for them.
        seed: names the new head's weights.

    Raises:
        UsageError: it cannot be found, read, or run here; the message says which and what to do.
    """
    quiet_libraries()
    device = find_device(options.device)
    check_quantization(options)
    if options.model.startswith("random:"):
        lm = _random(options.model.removeprefix("random:"), options)
    elif (adapter := _adapter_folder(options)) is not None:
        lm = _adapted(adapter, options, labels)
    elif (base := base_of_tuned(Path(options.model))) is not None:
        lm = _tuned(base, options)
    else:
        lm = _pretrained(options)
    if labels and lm.classifies:
        check_labels(lm.name, lm.config, labels)
    elif labels and lm.masked:
        check_head(lm.module, options)
        lm.module, lm.classifies = with_head(lm.module, labels, seed), True
    if not getattr(lm.base, "is_quantized", False):  # which transformers has put in its place, and does not move
        lm.module.to(device)
    lm.module.eval()
    return lm


def quiet_libraries() -> None:
    """Transformers and its companions speak through zotune's own progress and messages."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("huggingface_hub", "datasets", "peft", "bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What peft asks of transformers concerns their developers.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    # With a prompt peft leaves positions to the model, which counts them as it should: nothing is padded.
    warnings.filterwarnings("ignore", message="Position ids are not supported", category=UserWarning)


def find_device(name: str) -> torch.device:
    """A device by name; `auto` is a GPU where there is one.

    Raises:
        UsageError: it cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"the device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _random(name: str, options: ModelOptions) -> LanguageModel:
    """An architecture with random weights, the same ones each time."""
    import transformers

    if name not in ARCHITECTURES:
        raise UsageError(f"there is no architecture {name!r}.{did_you_mean(name, ARCHITECTURES)}")
    config = ARCHITECTURES[name]()
    masked = config.model_type == "roberta"
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = auto.from_config(config, dtype=_DTYPES.get(options.dtype, torch.float32))
    module.name_or_path = options.model
    return LanguageModel(module, byte_tokenizer(config), options.model, masked)


def _pretrained(options: ModelOptions) -> LanguageModel:
    import transformers

    if options.is_gguf:
        return _packed(options)
    built_in = options.model in BUILT_IN
    source = str(fetch(options.model, accept_terms=options.accept_terms)) if built_in else options.model
    if not Path(source).is_dir():
        say(f"looking for {source} on the Hub …")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        made = {name.rpartition("For")[2] for name in config.architectures or []}
        masked, classifies = "MaskedLM" in made, "SequenceClassification" in made
        auto = (
            transformers.AutoModelForSequenceClassification
            if classifies
            else transformers.AutoModelForMaskedLM
            if masked
            else transformers.AutoModelForCausalLM
        )
        dtype = _DTYPES.get(options.dtype, config.dtype or torch.float32)
        quantised = quantised_on_load(options.quantization, dtype, find_device(options.device))
        module = auto.from_pretrained(source, dtype=_DTYPES.get(options.dtype, "auto"), **quantised)
        keep_scales(module)
        # An adapter's folder names its base by this: not by where this machine's cache is.
        module.name_or_path = options.model
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UsageError(_not_loaded(options.model, error)) from None
    return LanguageModel(module, tokenizer, options.model, masked or classifies, classifies=classifies)


def _packed(options: ModelOptions) -> LanguageModel:
    """A model of a GGUF file, or the built-in one as its file has it."""
    import transformers

    named: dict[str, str] = {}
    if options.model in BUILT_IN:
        file = fetch_gguf(options.model, accept_terms=options.accept_terms)
        folder = fetch(options.model, accept_terms=options.accept_terms)
    else:
        file = Path(options.model)
        folder, named["gguf_file"] = file.parent, file.name
        say(f"reading configuration and tokenizer of {file}; that takes a while …")
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), **named)
        module = read_model(file, config, _DTYPES.get(options.dtype, torch.float32))
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **named)
        if not named:
            module.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(_not_loaded(options.model, error)) from None
    module.name_or_path = options.model
    return LanguageModel(module, tokenizer, options.model, masked=False)


def _adapter_folder(options: ModelOptions) -> Path | None:
    folder = Path(options.model)
    return folder if (folder / "adapter_config.json").is_file() else None


def _adapted(folder: Path, options: ModelOptions, labels: Sequence[str]) -> LanguageModel:
    """A base model with the adapter of a folder, as peft loads it."""
    from peft import PeftConfig, PeftModel

    base = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    quantization = options.quantization or saved_quantization(folder)
    lm = load(options.model_copy(update={"model": base, "quantization": quantization}), labels)
    lm.module = PeftModel.from_pretrained(lm.module, str(folder))
    if lm.num_virtual_tokens:
        accept_old_name(lm.base)
    lm.name = options.model
    return lm


def _tuned(base: str, options: ModelOptions) -> LanguageModel:
    """A base model of a GGUF file with the tensors of a folder."""
    lm = load(options.model_copy(update={"model": base, "quantization": "gguf"}))
    put_tuned(lm.module, Path(options.model))
    lm.name = options.model
    return lm


def _not_loaded(name: str, error: Exception) -> str:
    known = [*BUILT_IN, *(f"random:{a}" for a in ARCHITECTURES)]
    reason = str(error).strip().splitlines()[0]
    if Path(name).is_dir():
        return f"the folder {name!r} does not hold a model that transformers can load: {reason}"
    return (
        f"the model {name!r} is neither built in nor a local folder, and could not be had from the Hub ({reason})."
        f"{did_you_mean(name, known)} Without a network, fetch it where there is one with `hf download {name}` "
        "and give the folder."
    )
