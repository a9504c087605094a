"""Models by name: the built-in one, a Hub id, a local folder, or a known architecture with random weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotune.errors import UsageError, did_you_mean
from zotune.llm.architectures import ARCHITECTURES, byte_tokenizer
from zotune.llm.builtin import BUILT_IN, fetch
from zotune.llm.config import ModelOptions
from zotune.llm.objective import Batch, losses, scores, scores_of_single_tokens
from zotune.llm.progress import say

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LanguageModel:
    """A model of transformers with its tokenizer, and how zotune reads it.

    Attributes:
        module: a causal or masked language model of transformers, possibly wrapped by peft.
        masked: whether it fills in masks rather than continues text.
        num_forwards: forward passes so far.
    """

    module: nn.Module
    tokenizer: Any
    name: str
    masked: bool
    num_forwards: int = field(default=0)

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
        """(N, V) logits at the batch's scored positions; (N, K) of the tokens `only`, where given."""
        self.num_forwards += 1
        with _head_at(self.base, batch, only):
            return self.read(batch.input_ids, batch.attention_mask)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits of a forward pass of (S, L) tokens, padded on the right."""
        inputs: dict[str, Any] = {"input_ids": input_ids}
        # Right padding is invisible to causal attention, and without a mask attention runs its fast kernel.
        inputs |= {"attention_mask": attention_mask} if self.masked else {"use_cache": False}
        out: Tensor = self.module(**inputs).logits
        return out

    def score(self, batch: Batch) -> Tensor:
        """(examples, candidates) scores, float64: mean log-probabilities, or the same up to a constant an example."""
        if batch.only_single_tokens and isinstance(self.base.get_output_embeddings(), nn.Linear):
            return scores_of_single_tokens(self.logits(batch, torch.unique(batch.tokens)), batch)
        return scores(self.logits(batch), batch)

    def losses(self, batch: Batch) -> Tensor:
        """(examples,) losses, float64."""
        return losses(self.score(batch), batch)


def head_of(model: Any) -> nn.Module:
    """What makes logits of hidden states: the output layer itself, or the part of the model that ends in it."""
    output = model.get_output_embeddings()
    parts: list[nn.Module] = list(model.children())
    return next(part for part in parts if part is output or output in set(part.modules()))


@contextmanager
def _head_at(model: Any, batch: Batch, only: Tensor | None) -> Iterator[None]:
    """Let the head see the hidden states at the scored positions alone, and make the logits of the tokens `only`."""
    output, head = model.get_output_embeddings(), head_of(model)

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args
        # Virtual tokens stand before the batch's own; positions count from the first of its own.
        own = hidden[:, -batch.input_ids.shape[1] :]
        return (own.reshape(-1, own.shape[-1])[batch.positions], *rest)

    def rows(module: nn.Linear, hidden: Tensor) -> Tensor:
        assert only is not None
        bias = None if module.bias is None else module.bias[only]
        # As a look-up, so that a perturbed head is perturbed only in the rows that are read.
        return F.linear(hidden, F.embedding(only, module.weight), bias)

    handle = head.register_forward_pre_hook(select)
    own = vars(output).get("forward")
    if only is not None:
        output.forward = lambda hidden: rows(output, hidden)
    try:
        yield
    finally:
        handle.remove()
        if own is not None:
            output.forward = own
        elif only is not None:
            del output.forward


def load(options: ModelOptions) -> LanguageModel:
    """The model that `options` name, in eval mode, on its device.

    Raises:
        UsageError: it cannot be found, read, or run here; the message says which and what to do.
    """
    quiet_libraries()
    device = _device(options.device)
    if options.model.startswith("random:"):
        lm = _random(options.model.removeprefix("random:"), options)
    else:
        lm = _pretrained(options)
    lm.module.to(device)
    lm.module.eval()
    return lm


def quiet_libraries() -> None:
    """Transformers and its companions speak through zotune's own progress and messages."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("huggingface_hub", "datasets", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What peft asks of transformers concerns their developers.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)


def _device(name: str) -> torch.device:
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

    built_in = options.model in BUILT_IN
    source = str(fetch(options.model, accept_terms=options.accept_terms)) if built_in else options.model
    if not Path(source).is_dir():
        say(f"looking for {source} on the Hub …")
    try:
        if (Path(source) / "adapter_config.json").is_file():
            return _adapted(Path(source), options)
        config = transformers.AutoConfig.from_pretrained(source)
        masked = any(name.endswith("ForMaskedLM") for name in config.architectures or [])
        auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
        module = auto.from_pretrained(source, dtype=_DTYPES.get(options.dtype, "auto"))
        # An adapter's folder names its base by this: not by where this machine's cache is.
        module.name_or_path = options.model
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(_not_loaded(options.model, error)) from None
    return LanguageModel(module, tokenizer, options.model, masked)


def _adapted(folder: Path, options: ModelOptions) -> LanguageModel:
    """A base model with the adapter of a folder, as peft loads it."""
    from peft import PeftConfig, PeftModel

    base = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    lm = load(options.model_copy(update={"model": base}))
    lm.module = PeftModel.from_pretrained(lm.module, str(folder))
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
