"""Generating text from prompts, by greedy decoding or by sampling with counter-based random numbers.

A sampled token is the one at which the cumulative probability exceeds a number in [0, 1) that depends only on the
row's seed and the token's position. So the text of a row does not depend on the other rows of its batch, both probes
of a step use the same random numbers (their difference is due to the weights alone), and no global generator is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.llm.models.cache_argument import cache_argument
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.scoring.finite import check_best
from zotune.llm.scoring.streaming import Stream, streamer_of
from zotune.noise import derive_seed

MAX_NEW_TOKENS = 50

Prefill = Callable[[Sequence[tuple[int, ...]]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Sampling:
    """The options of sampling.

    Attributes:
        temperature: divisor of the logits; > 0.
        top_p: sample among the most likely tokens whose probabilities add up to this value, in (0, 1].
        seeds: seed of each row's random numbers.
    """

    temperature: float
    top_p: float
    seeds: tuple[int, ...]


def generate(
    lm: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int = MAX_NEW_TOKENS,
    *,
    stops_at_newline: bool = True,
    sampling: Sampling | None = None,
    prefill: Prefill = lambda prompts: nullcontext(),
    places: Sequence[str] | None = None,
    stream: Stream | None = None,
) -> list[str]:
    """Generate the continuation of each prompt, up to a newline (with `stops_at_newline`) or one of the end tokens.

    The end tokens are those of the tokenizer and of the checkpoint's generation configuration, which for chats often
    names the end of a turn beside the end of text (`LanguageModel.end_tokens`).

    Decoding is greedy unless `sampling` is given. Each new token takes one call of the model, with cached keys and
    values; `lm.num_forwards` counts the calls. After virtual tokens only prompts of one length share a batch, because
    peft puts padding between virtual tokens and prompt, where it occupies positions and sliding windows; so they do for
    models that might read padding as text. `prefill`
    returns a context in which the first pass over the prompts is cheaper (`zotune.llm.models.prompt_cache`). The text
    of a single prompt can be read while it is generated, and stopped, through `stream`.

    Raises:
        NonFiniteScoreError: the logits after a prompt are not finite; `places` names the prompts in the message.
        ValueError: `stream` is given with several prompts.
    """
    if stream is not None and len(prompts) != 1:
        raise ValueError(f"a stream takes the text of one prompt, not of {len(prompts)}.")
    places = [f"prompt {i}" for i in range(1, 1 + len(prompts))] if places is None else places
    is_one_length = len(set(map(len, prompts))) == 1 and not lm.num_virtual_tokens
    if is_one_length or lm.generates_padded(max(map(len, prompts)) + max_new_tokens):
        with prefill(prompts):
            return _generate(lm, prompts, max_new_tokens, stops_at_newline, sampling, places, stream)
    texts = [""] * len(prompts)
    for length in sorted(set(map(len, prompts))):
        indices = [i for i, p in enumerate(prompts) if len(p) == length]
        batch_sampling = (
            None if sampling is None else replace(sampling, seeds=tuple(sampling.seeds[i] for i in indices))
        )
        some, their_places = [prompts[i] for i in indices], [places[i] for i in indices]
        generated = _generate(lm, some, max_new_tokens, stops_at_newline, batch_sampling, their_places, stream)
        for i, text in zip(indices, generated, strict=True):
            texts[i] = text
    return texts


def _generate(
    lm: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    stops_at_newline: bool,
    sampling: Sampling | None,
    places: Sequence[str],
    stream: Stream | None,
) -> list[str]:
    """Generate from prompts padded on the left to one length."""
    from transformers import GenerationConfig, StoppingCriteriaList

    lm.reset()
    length = max(map(len, prompts))
    padded = [[lm.pad_token_id] * (length - len(p)) + list(p) for p in prompts]
    mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    input_ids, attention_mask = (torch.tensor(rows, device=lm.device) for rows in (padded, mask))
    if lm.num_virtual_tokens:
        model, inputs, length = lm.base, *_inputs_after_virtual_tokens(lm, input_ids)
    else:
        model, inputs = lm.module, {"input_ids": input_ids, "attention_mask": attention_mask}
    ends = lm.end_tokens
    with _plain_decoding(model):
        out: Tensor = model.generate(
            **inputs,
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=lm.pad_token_id,
                eos_token_id=sorted(ends) or None,
            ),
            stopping_criteria=StoppingCriteriaList(
                ([_LineEnd(lm.tokenizer)] if stops_at_newline else []) + ([] if stream is None else [stream])
            ),
            streamer=None if stream is None else streamer_of(stream, lm.tokenizer, ends),
            logits_processor=_processors(sampling, length, places),
        )
    lm.num_forwards += out.shape[1] - length
    # A finished row is padded, and neither its end token nor the padding need be special tokens of the tokenizer.
    rows = [list(takewhile(lambda token: token not in ends, row)) for row in out[:, length:].tolist()]
    texts = [lm.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return [(text.split("\n")[0] if stops_at_newline else text).strip() for text in texts]


@contextmanager
def _plain_decoding(model: Any) -> Iterator[None]:
    """Within this context the checkpoint's own generation configuration, with its penalties and bans, has no effect.

    `generate` of transformers fills in from it whatever a given configuration leaves open.
    """
    from transformers import GenerationConfig

    # The `generate` of peft writes the configuration of the wrapper into the model inside it, and leaves it there.
    get_base = getattr(model, "get_base_model", None)
    models = [model] if get_base is None else [model, get_base()]
    own = [m.generation_config for m in models]
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for m, config in zip(models, own, strict=True):
            m.generation_config = config


@torch.no_grad()
def _inputs_after_virtual_tokens(lm: LanguageModel, input_ids: Tensor) -> tuple[dict[str, Any], int]:
    """Return the inputs of transformers' `generate` for virtual tokens followed by (S, L) prompts without padding.

    The `generate` of peft looks for the cache under a name that transformers 5.24 changed, and would put the virtual
    tokens before each new token again.

    Returns:
        The inputs, and the number of tokens that `generate` returns before the first new one.
    """
    from transformers import Cache

    module: Any = lm.module
    virtual = module.get_prompt(len(input_ids))
    length = lm.num_virtual_tokens + input_ids.shape[1]
    mask = torch.ones(len(input_ids), length, dtype=torch.long, device=lm.device)
    if isinstance(virtual, Cache):
        # A prefix is in the cache; `generate` skips as many of the first tokens as the cache holds.
        padded = F.pad(input_ids, (lm.num_virtual_tokens, 0), value=lm.pad_token_id)
        return {"input_ids": padded, "attention_mask": mask, cache_argument(lm.base): virtual}, length
    embeddings = module.word_embeddings(input_ids)
    # `generate` does not return tokens for embeddings.
    return {"inputs_embeds": torch.cat([virtual.to(embeddings.dtype), embeddings], 1), "attention_mask": mask}, 0


def _processors(sampling: Sampling | None, prompt_length: int, places: Sequence[str]) -> Any:
    """Return the processors of the logits, after which the best token is chosen."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    processors: list[Any] = [_CheckFinite(tuple(places))]
    if sampling is not None:
        processors += [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1 else []
        processors += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        processors += [_Draw(sampling.seeds, prompt_length)]
    return LogitsProcessorList(processors)


@dataclass(frozen=True)
class _CheckFinite:
    """Refuse logits without a best token; the choice among NaN would be the first token."""

    places: tuple[str, ...]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_best(scores, self.places)
        return scores


@dataclass(frozen=True)
class _Draw:
    """Keep one token per row: the one at which the cumulative probability exceeds the row's random number."""

    seeds: tuple[int, ...]
    prompt_length: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        numbers = [uniform(seed, position) for seed in self.seeds]
        cumulative = scores.double().softmax(dim=1).cumsum(dim=1)
        # Scale by the rounded sum, so that the number stays below it and a token of probability 0 is never drawn.
        passed = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, passed, right=True)
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn, 0.0)


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1), a multiple of 2⁻⁵², that depends on a seed and a position.

    >>> 0 <= uniform(7, 0) < 1, uniform(7, 0) == uniform(7, 0), uniform(7, 0) == uniform(7, 1)
    (True, True, False)
    """
    return float((derive_seed(seed, position) >> 12) * 2.0**-52)


@dataclass
class _LineEnd:
    """A stopping criterion: the last token of a sequence contains a newline."""

    tokenizer: Any
    _known: dict[int, bool] = field(default_factory=dict)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        last = input_ids[:, -1].tolist()
        return torch.tensor([self._ends(token) for token in last], dtype=torch.bool, device=input_ids.device)

    def _ends(self, token: int) -> bool:
        if token not in self._known:
            self._known[token] = "\n" in self.tokenizer.decode([token])
        return self._known[token]
