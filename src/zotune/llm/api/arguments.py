"""Options as keyword arguments: those of the command line by the same names, and messages that speak of arguments."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel

from zotune.errors import UsageError
from zotune.llm.config.aliases import resolve_aliases
from zotune.llm.config.data import IN_MEMORY
from zotune.llm.config.schema import validate
from zotune.llm.models.language_model import LanguageModel
from zotune.messages import say

Config = TypeVar("Config", bound=BaseModel)

# Options that name what the caller has loaded.
_BY_NAME = (
    *("model", "model_revision", "trust_remote_code", "attn_implementation"),
    *("dtype", "quantization", "device", "device_map", "offload_folder", "accept_terms"),
    *("task", "train_file", "eval_file", "data_source", "prompt"),
)
_DTYPES = ("float32", "bfloat16", "float16")
_OPTION = re.compile(r"--([a-z][a-z-]*[a-z])")
_ARGUMENTS = {"train_file": "train_dataset", "eval_file": "eval_dataset"}


def config_of(schema: type[Config], lm: LanguageModel, options: Mapping[str, Any], function: str) -> Config:
    """Return the record of the options of a call on a loaded model.

    Args:
        schema: the record of the command that does the same.
        lm: the model, whose name and precision the record holds.
        options: the options that the caller gave.
        function: the name of the function, for errors.

    Raises:
        UsageError: an option is unknown, has a wrong value, or names what the caller passes as an argument.
    """
    options = _with_names_of_functions(our_names(schema, options, function))
    dtype = str(lm.base.dtype).removeprefix("torch.")
    loaded = {"model": lm.name, "dtype": dtype if dtype in _DTYPES else "auto", "data_source": IN_MEMORY}
    return validate(schema, {**options, **loaded}, f"{function}()")


def our_names(schema: type[BaseModel], options: Mapping[str, Any], function: str) -> dict[str, Any]:
    """Return options under our own names; those of other tools are accepted where they mean the same.

    Raises:
        UsageError: an option names what the caller passes as an argument, or has no counterpart here.
    """
    ours = resolve_aliases(options, schema.model_fields, f"{function}()")
    named = next((name for name in _BY_NAME if name in ours), None)
    if named is not None:
        asked = named if named in options else f"{named} (or another tool's name of it)"
        raise UsageError(
            f"{function}() has no option {asked}, because it takes a model and rows that are loaded. To name them, "
            f"use {function}({schema.__name__}({named}=…))."
        )
    return ours


def _with_names_of_functions(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with the names of rewards and metrics in place of the functions.

    Raises:
        UsageError: a function has no name by which it is found again.
    """
    named = dict(options)
    if callable(objective := options.get("objective")):
        named["objective"] = _name_of("objective", objective)
    metrics = options.get("compute_metrics")
    if metrics is not None:
        metrics = metrics if isinstance(metrics, list | tuple) else [metrics]
        named["compute_metrics"] = [_name_of("compute_metrics", m) if callable(m) else m for m in metrics]
    return named


def _name_of(option: str, function: Any) -> str:
    """Return the name by which a function is found again."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__name__", "")
    if getattr(sys.modules.get(module), name, None) is not function:
        raise UsageError(
            f"{option}: the function {name or function!r} cannot be found by its name. Define it with `def` at the "
            "top level of a module or a notebook."
        )
    return f"{module}:{name}"


@contextmanager
def in_words_of_python() -> Iterator[None]:
    """Within this context the messages of errors name arguments in place of the command line's options."""
    try:
        yield
    except (UsageError, KeyboardInterrupt) as error:
        error.args = tuple(in_python(text) for text in error.args)
        raise


def say_in_python(message: str) -> None:
    """Print a message with arguments in place of options of the command line."""
    say(in_python(message))


def in_python(message: str) -> str:
    """Return a message with arguments in place of options of the command line.

    >>> in_python("Lower --num-train, or give other rows with --eval-file.")
    'Lower num_train, or give other rows with eval_dataset.'
    """

    def argument(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        return _ARGUMENTS.get(name, name)

    return _OPTION.sub(argument, message)
