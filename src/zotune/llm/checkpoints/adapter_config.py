"""What a configuration of peft may say: it may name no module to import, and no files, models or tokenizers elsewhere.

The same holds for the key `peft_config` of a run, which a ledger may bring along.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from zotune.errors import UsageError
from zotune.system.bounds import COUNT

# Keys of peft that name a module, a file or another model, with the values that name none.
_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
    "prompt_tuning_init_state_dict_path": (None,),
    "shadow_model": (None, "mirror"),
    "adapters": (None, {}),
    "cache_file": (None,),
    "covariance_file": (None,),
}
_COUNTS = ("r", "rank", "num_virtual_tokens", "num_layers", "token_dim", "encoder_hidden_size", "num_vectors")
_PATTERNS = (
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
)


def check_adapter_config(values: Mapping[str, Any], what: str, base: str) -> None:
    """Check the keys and values of a configuration of peft.

    Args:
        values: the configuration.
        what: its origin, for errors.
        base: name of the base model, whose tokenizer it may name.

    Raises:
        UsageError: it names code, files, another model or another tokenizer, a pattern that may take for ever, a
            count that is too large, or tokens that are none.
    """
    own_tokenizer = (None, "", base, values.get("base_model_name_or_path"))
    for key, value in _entries(values):
        if key in _ELSEWHERE and value not in _ELSEWHERE[key]:
            raise UsageError(
                f"{what} sets {key}: {str(value)[:80]!r}, which names code, files or a model elsewhere; an adapter is "
                "read from its folder and its base model alone. Remove the key."
            )
        if key == "tokenizer_name_or_path" and value not in own_tokenizer:
            raise UsageError(
                f"{what} names the tokenizer {str(value)[:80]!r}, which is not that of its base model {base}. Remove "
                "the key."
            )
        if key == "alora_invocation_tokens" and not _are_ids(value):
            raise UsageError(f"{what} sets {key}: {str(value)[:80]!r}; it must be a list of token ids, or null.")
        if key in _COUNTS and isinstance(value, int):
            COUNT.check(value, f"{key} in {what}")
        if key in _PATTERNS:
            for pattern in [value] if isinstance(value, str) else value if isinstance(value, list | dict) else ():
                check_pattern(str(pattern), f"{key} in {what}")


def _are_ids(value: Any) -> bool:
    """Whether a value is a list of token ids, or none; peft reads it in the first forward pass."""
    return value is None or (isinstance(value, list) and bool(value) and all(type(part) is int for part in value))


def _entries(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a mapping, and those of the mappings in it."""
    for key, value in values.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _entries(value)


def check_pattern(pattern: str, what: str) -> None:
    r"""Check that a regular expression repeats nothing that repeats, which takes exponential time on some texts.

    A pattern that is no regular expression passes, since its user reports it.

    Raises:
        UsageError: it does, or it is longer than a name could be.

    >>> check_pattern(r"layers\.[0-9]+\..*(q|v)_proj", "the pattern")
    >>> check_pattern("(a+)+b", "the pattern")
    Traceback (most recent call last):
    zotune.errors.UsageError: the pattern, '(a+)+b', repeats a part that itself repeats, which may take for ever.
    """
    if len(pattern) > 10_000:
        raise UsageError(f"{what} is a regular expression of {len(pattern):,} characters; at most 10,000 are tried.")
    try:
        tree: Any = re._parser.parse(pattern)  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError):
        return
    if _repeats_twice(tree, False):
        raise UsageError(f"{what}, {pattern[:80]!r}, repeats a part that itself repeats, which may take for ever.")


def _repeats_twice(tree: Any, inside: bool) -> bool:
    """Whether a parsed regular expression holds a repetition of any length within another one."""
    for name, argument in tree:
        repeats = str(name) in ("MAX_REPEAT", "MIN_REPEAT") and argument[1] > 16
        if repeats and inside:
            return True
        if any(_repeats_twice(part, inside or repeats) for part in _parts(argument)):
            return True
    return False


def _parts(argument: Any) -> Iterator[Any]:
    """Yield the parsed parts within an element of a regular expression."""
    if isinstance(argument, re._parser.SubPattern):  # type: ignore[attr-defined]
        yield argument
    elif isinstance(argument, list | tuple):
        for one in argument:
            yield from _parts(one)
