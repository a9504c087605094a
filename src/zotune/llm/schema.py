"""Records that check themselves: the base of every config, and errors that name the key and the nearest known one."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo

from zotune.errors import UsageError, did_you_mean


class Options(BaseModel):
    """A frozen record of options that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())


Config = TypeVar("Config", bound=BaseModel)


def is_partial(info: ValidationInfo) -> bool:
    """Whether the record is a recipe that options may still complete: what keys say of each other waits."""
    return bool(info.context and info.context.get("partial"))


def validate(schema: type[Config], values: dict[str, Any], source: str, *, partial: bool = False) -> Config:
    """A record of `schema` from plain values; the errors name `source`, the key, and the nearest known key."""
    try:
        return schema.model_validate(values, context={"partial": partial})
    except ValidationError as error:
        raise UsageError("\n".join(f"{source}: {_explain(schema, e)}" for e in error.errors())) from None


def _explain(schema: type[BaseModel], error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{did_you_mean(key, schema.model_fields)}"
    if error["type"] == "literal_error":
        choices = [choice.strip(" '") for choice in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{key} is {error['input']!r}.{did_you_mean(str(error['input']), choices)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key} is {error['input']!r}: {message}" if key else message
