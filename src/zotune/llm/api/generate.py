"""Generating text with a model that is loaded, as objectives and evaluations of generated text do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

from zotune.errors import UsageError
from zotune.llm.api.arguments import config_of, in_words_of_python
from zotune.llm.api.loaded import borrowed
from zotune.llm.api.rows import rows_of
from zotune.llm.config.data import MIN_LENGTH
from zotune.llm.config.run import EvalConfig
from zotune.llm.inference.answers import REWARD, answers, encode_prompts


@overload
def generate(model: Any, tokenizer: Any, prompts: str, *, seed: int = 0, **options: Any) -> str: ...


@overload
def generate(model: Any, tokenizer: Any, prompts: Sequence[Any], *, seed: int = 0, **options: Any) -> list[str]: ...


def generate(
    model: Any, tokenizer: Any, prompts: str | Sequence[Any], *, seed: int = 0, **options: Any
) -> str | list[str]:
    """Generate a text after each prompt with a loaded model: greedily, or with `temperature` or `top_p` by sampling.

    Args:
        model: a causal language model of transformers, or a `peft.PeftModel`, as for `zotune.llm.train`.
        tokenizer: the model's tokenizer (or its processor).
        prompts: a text, or a sequence of texts, of chats (each a list of messages), or of rows (`{"prompt": …}`, or
            columns that `template` names). A chat is rendered by the tokenizer's chat template, up to the answer.
        seed: seed of sampling; a text depends on the seed and its prompt's place in the sequence alone.
        options: options of `EvalConfig` by name: `max_new_tokens` (50), `stop_at` ("end", or "newline" for one line),
            `generation` ("greedy" or "sample"), `temperature`, `top_p`, `template`, `max_length`,
            `per_device_eval_batch_size`, …

    Returns:
        The new text of each prompt, without white space around it; a text for a single text.

    Raises:
        UsageError: an option or a prompt does not suit the model.

    >>> from zotune.llm import generate, load
    >>> model, tokenizer = load("random:llama-tiny", device="cpu")
    >>> texts = generate(model, tokenizer, ["Once upon", "The end"], max_new_tokens=4)
    >>> len(texts), generate(model, tokenizer, "Once upon", max_new_tokens=4) == texts[0]
    (2, True)
    """
    if not isinstance(prompts, str) and any(isinstance(p, Mapping) and {*p} == {"role", "content"} for p in prompts):
        raise UsageError("generate(): a chat is a list of messages, and prompts a list of chats: give [messages].")
    rows = [_row(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
    if not rows:
        return []
    _check_length(options)
    if options.get("temperature") == 0:  # as in other libraries, the most likely token
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p")}
    if {"temperature", "top_p"} & options.keys():
        options = {"generation": "sample", **options}
    with in_words_of_python(), borrowed(model, tokenizer) as lm:
        config = config_of(EvalConfig, lm, {"stop_at": "end", **options, "objective": REWARD}, "generate")
        texts = answers(lm, encode_prompts(lm, rows_of(rows, "prompts"), config), config, seed)
    return texts[0] if isinstance(prompts, str) else texts


def _check_length(options: Mapping[str, Any]) -> None:
    """Refuse a `max_length` that transformers' `generate` would understand as the length of prompt and text."""
    length = options.get("max_length")
    if isinstance(length, int) and length < MIN_LENGTH:
        raise UsageError(
            f"generate(): max_length={length} would cut the prompts to so many tokens; it is at least {MIN_LENGTH}. "
            f"For the length of the new text give max_new_tokens={length}."
        )


def _row(prompt: Any) -> Any:
    """Return the row of a text, of the messages of a chat, or of columns."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return prompt if isinstance(prompt, Mapping) else {"messages": prompt}
