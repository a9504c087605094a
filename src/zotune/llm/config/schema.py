"""The base class of all configs: validated records, errors that suggest the nearest key, and groups for `--help`."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, WithJsonSchema, field_validator
from pydantic.fields import FieldInfo

from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.aliases import resolve_aliases
from zotune.llm.config.safe_yaml import parse_yaml

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

# Values in messages are shortened to a few lines: a list may be a list of lists of lists.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_MAX_ERRORS = 3


class _CheckedInWords(ModelMetaclass):
    """Makes a call of the class raise what `validate` raises, for pydantic's own errors are about its schemas."""

    def __call__(self, *args: Any, **values: Any) -> Any:
        if args:
            return super().__call__(*args, **values)
        return validate(self, values, f"{self.__name__}()")  # type: ignore[arg-type]


class Options(BaseModel, metaclass=_CheckedInWords):
    """A frozen record of options that refuses keys it does not know, and words what is wrong."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="after")
    @classmethod
    def _is_usable(cls, value: Any) -> Any:
        """Refuse here, before its first use, a value that no machine integer, file name or file can hold."""
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ValueError("the number is 2**63 or more, which no option can hold; give a smaller one")
        text = str(value) if isinstance(value, str | Path | tuple | dict) else ""
        if "\0" in text or r"\x00" in text:
            raise ValueError("the text contains a NUL character, which no option can hold; remove it")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(
                "the text contains half a character (a lone surrogate), which no option can hold; remove it"
            )
        return value


# For editors: a recipe has the mapping itself.
MAPPING_OR_TEXT = WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]})


# A number of steps, or below 1 a fraction of all steps, as transformers has them.
StepsOrFraction = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]


def as_json(value: Any) -> Any:
    """Return a mapping, or the YAML text of one, as one line of JSON.

    Raises:
        ValueError: the value is neither.
    """
    try:
        plain = parse_yaml(value) if isinstance(value, str) else value
        text = json.dumps(plain)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'it must be a mapping, like {{"r": 4}} ({error})') from None
    if not isinstance(plain, dict):
        raise ValueError('it must be a mapping, like {"r": 4}')
    return text


COMMAND_LINE_ONLY = ("trust_remote_code",)
"""The options that no file sets or records: they are given on the command line, or as an argument in Python."""

GROUPS = ("Model", "Data", "Tuning", "Method", "Run", "Evaluation", "Output")
"""The groups of options, in the order in which `--help` shows them."""

# The options of each group; those that most people set come first.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "Model": (
        *("model", "model_revision", "dtype", "quantization", "device", "attn_implementation", "accept_terms"),
        *("device_map", "offload_folder", "trust_remote_code"),
    ),
    "Data": (
        *("task", "train_file", "eval_file", "data_source", "num_train", "num_dev", "num_eval", "max_length"),
        *("prompt", "template", "verbalizer", "data_format", "text_column", "label_column", "columns", "delimiter"),
        *("packing", "long_rows", "chat_template", "system_prompt", "apply_chat_template", "train_file_weights"),
        *("streaming", "scored_turns", "chat_date", "read_control_tokens", "data_seed", "num_more_eval"),
    ),
    "Tuning": (
        *("tuning", "lora_r", "lora_alpha", "lora_target_modules", "lora_init", "tuned_layers", "only_layer"),
        *("tuned_parameters", "activation_rank", "direction_scale"),
        *("num_virtual_tokens", "peft_type", "peft_config"),
    ),
    "Method": (
        *("method", "learning_rate", "mu", "num_queries", "lr_scheduler_type", "warmup_steps", "warmup_ratio"),
        *("objective", "rounding", "sampler"),
        *("difference", "weight_decay", "max_coefficient", "momentum", "sign", "adam", "adam_beta1", "adam_beta2"),
        *("adam_epsilon", "window", "blocks", "block_size", "block_order", "sparsity", "mask", "mask_group"),
        *(
            "mask_interval",
            "rank",
            "rank_interval",
            "rank_scale",
            "square_subspaces",
            "hessian_share",
            "spectral_rank",
            "vector_learning_rate",
        ),
        *("std_ddof", "divide_by_mu", "keep_best", "only_better", "block_choice", "block_explore", "block_decay"),
        *(
            "block_unbiased",
            "directions_per_batch",
            "flipped",
            "hybrid_layers",
            "hybrid_method",
            "hybrid_learning_rate",
        ),
        *("hybrid_tied", "generation", "temperature", "top_p", "max_new_tokens", "stop_at", "lr_scheduler_kwargs"),
    ),
    "Run": (
        *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
        *("resume", "resume_from_checkpoint", "gradient_checkpointing"),
        *(
            "reuse_activations",
            "reuse_memory",
            "reuse_file",
            "reuse_folder",
            "parallel",
            "shard",
            "check_ranks",
            "timeout",
        ),
    ),
    "Evaluation": (
        *("eval_steps", "eval_strategy", "load_best_model_at_end", "metric_for_best_model"),
        *("early_stopping_patience", "exact_match", "compute_metrics"),
        *("num_demonstrations", "baselines", "per_device_eval_batch_size", "vote"),
    ),
    "Output": (
        *("output_dir", "overwrite_output_dir", "logging_steps", "logging_strategy", "report_to", "run_name"),
        *("save_steps", "save_strategy", "save_total_limit", "predictions"),
        *("push_to_hub", "hub_model_id", "hub_private_repo"),
    ),
}
_GROUP_OF = {name: group for group, names in _OPTIONS.items() for name in names}
_PLACE_OF = {name: place for place, name in enumerate(_GROUP_OF)}

Config = TypeVar("Config", bound=BaseModel)


def group_of(schema: type[BaseModel], name: str) -> str:
    """Return the group of an option in `--help`, one of `GROUPS`.

    A field's own `json_schema_extra={"group": …}` takes precedence over the table of this module.

    Raises:
        KeyError: the schema has no such option, or the option has no group.

    >>> from zotune.llm.config.run import TrainConfig
    >>> group_of(TrainConfig, "learning_rate")
    'Method'
    """
    extra = schema.model_fields[name].json_schema_extra
    group = extra.get("group") if isinstance(extra, dict) else None
    return str(group) if group is not None else _GROUP_OF[name]


def options_by_group(schema: type[BaseModel]) -> dict[str, list[str]]:
    """Return the schema's options by group, in the order of `--help`; groups without an option are left out.

    >>> from zotune.llm.config.run import EvalConfig
    >>> options_by_group(EvalConfig)["Model"][:1]
    ['model']
    """
    names = sorted(schema.model_fields, key=lambda name: _PLACE_OF.get(name, len(_PLACE_OF)))
    options = {group: [name for name in names if group_of(schema, name) == group] for group in GROUPS}
    return {group: names for group, names in options.items() if names}


def is_partial(info: ValidationInfo) -> bool:
    """Whether the record is a recipe that options may still complete, so that checks across keys have to wait."""
    return bool(info.context and info.context.get("partial"))


def check_file(values: Mapping[Any, Any], source: str) -> None:
    """Check that a file sets no option that only the command line or an argument in Python may set.

    Raises:
        UsageError: it does.

    >>> check_file({"model": "gpt2", "trust-remote-code": True}, "theirs.yaml")
    Traceback (most recent call last):
    zotune.errors.UsageError: theirs.yaml sets trust_remote_code, which no file may set. Take the line out, ...
    """
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in COMMAND_LINE_ONLY and value not in (False, None):
            raise UsageError(
                f"{source} sets {name}, which no file may set. Take the line out, and give --{name.replace('_', '-')} "
                "on the command line if you trust the author of the model."
            )


def validate(schema: type[Config], values: dict[str, Any], source: str, *, partial: bool = False) -> Config:
    """Return a record of `schema` from plain values; names of other tools are accepted where they mean the same.

    Raises:
        UsageError: a key is unknown or a value is wrong; the message names `source`, the key, and the nearest known
            key, or what to do in place of another tool's option.
    """
    values = resolve_aliases(values, schema.model_fields, source)
    try:
        return schema.model_validate(values, context={"partial": partial})
    except ValidationError as error:
        messages = [f"{source}: {text}" for text in _explanations(schema, error.errors())]
    more = len(messages) - _MAX_ERRORS
    raise UsageError("\n".join([*messages[:_MAX_ERRORS], *([f"{source}: {more} more errors"] if more > 0 else [])]))


def _explanations(schema: type[BaseModel], errors: Sequence[Any]) -> list[str]:
    """Return a sentence for each key that is wrong; of the errors of a union's types, which are one key's, one."""
    by_key: dict[str, Any] = {}
    for error in errors:
        is_union = get_origin(_annotation(schema, error)) in (Union, UnionType)
        path = error["loc"][:1] if is_union else error["loc"]
        key = ".".join(_SHORT.repr(part) if len(str(part)) > 80 else str(part) for part in path)
        if error["type"] != "default_factory_not_called":  # for this, another key's error is the reason
            by_key.setdefault(key, error)
    return [_explain(schema, key, error) for key, error in by_key.items()]


def _annotation(schema: type[BaseModel], error: Any) -> Any:
    field = schema.model_fields.get(error["loc"][0]) if error["loc"] else None
    return None if field is None else field.annotation


def _explain(schema: type[BaseModel], key: str, error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{did_you_mean(key, schema.model_fields)}"
    value = _SHORT.repr(error["input"])
    if error["type"] == "literal_error" and not isinstance(error["input"], bool):
        choices = [choice.strip(" '") for choice in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{key} is {value}.{did_you_mean(value[1:-1], choices)}"
    field = schema.model_fields.get(str(error["loc"][0])) if error["loc"] else None
    if error["type"] == "value_error" or field is None:
        message = error["msg"].removeprefix("Value error, ")
        return f"{key} is {value}: {message}" if key else message
    expected = accepted_by(field) if key in schema.model_fields else accepted_within(field)
    quotes = ", in quotes" if expected == "a text" and isinstance(error["input"], int | float) else ""
    return f"{key} is {value}; it must be {expected}{quotes}."


# What the value of an option may be, in words ---------------------------------------------------------------

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
_BOUNDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}


def accepted_by(field: FieldInfo) -> str:
    """Return what an option may be.

    >>> from zotune.llm.config.run import TrainConfig
    >>> accepted_by(TrainConfig.model_fields["max_steps"]), accepted_by(TrainConfig.model_fields["sparsity"])
    ('a whole number of at least 1', 'a number of at least 0 and below 1')
    """
    return accepted(field.annotation, field.metadata)


def accepted_within(field: FieldInfo) -> str:
    """Return what an element of an option that holds several values may be.

    >>> from zotune.llm.config.run import TrainConfig
    >>> accepted_within(TrainConfig.model_fields["verbalizer"])
    'a text'
    """
    parts = [part for part in get_args(field.annotation) if part is not Ellipsis]
    return accepted(parts[-1]) if parts else accepted_by(field)


def accepted(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    """Return what the values of a type with some bounds are.

    >>> accepted(float | Literal["auto"] | None), accepted(tuple[str, ...]), accepted(Literal["no", "steps"])
    ('a number, or auto', 'one or several texts', 'no or steps')
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return accepted(parts[0], (*constraints, *parts[1:]))
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin in (Union, UnionType):
        return ", or ".join(accepted(part, constraints) for part in parts if part is not NoneType)
    if origin is tuple:
        return f"one or several {accepted(parts[0]).removeprefix('a ')}s"
    if origin is dict:
        return "pairs of a name and a value"
    bounds = " and ".join(_bounds(constraints))
    return f"{_KINDS.get(annotation, 'another value')} {bounds}".strip()


def _bounds(constraints: Iterable[Any]) -> list[str]:
    """Return the bounds of a number, each with its preposition."""
    inner = [c for x in constraints for c in (x.metadata if isinstance(x, FieldInfo) else [x])]
    found = ((words, getattr(c, name, None)) for c in inner for name, words in _BOUNDS.items())
    return [f"{words} {bound:g}" for words, bound in found if bound is not None]
