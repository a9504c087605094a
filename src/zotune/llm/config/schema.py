"""Records that check themselves: the base of every config, and errors that name the key and the nearest known one."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from zotune.errors import UsageError, did_you_mean

# Values in messages: some lines of text at most, for a list may be a list of lists of lists.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_MOST_ERRORS = 3


class Options(BaseModel):
    """A frozen record of options that refuses keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="after")
    @classmethod
    def _is_usable(cls, value: Any) -> Any:
        """What no machine integer, file name or file can hold is refused here, not where it is first used."""
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ValueError("no option takes a number of 2**63 or more")
        text = str(value) if isinstance(value, str | Path | tuple | dict) else ""
        if "\0" in text or r"\x00" in text:
            raise ValueError("no option takes a text with a NUL character")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError("no option takes a text with half a character (a lone surrogate)")
        return value


Config = TypeVar("Config", bound=BaseModel)


def is_partial(info: ValidationInfo) -> bool:
    """Whether the record is a recipe that options may still complete: what keys say of each other waits."""
    return bool(info.context and info.context.get("partial"))


def validate(schema: type[Config], values: dict[str, Any], source: str, *, partial: bool = False) -> Config:
    """A record of `schema` from plain values; the errors name `source`, the key, and the nearest known key."""
    try:
        return schema.model_validate(values, context={"partial": partial})
    except ValidationError as error:
        found = [f"{source}: {_explain(schema, e)}" for e in error.errors()[:_MOST_ERRORS]]
        more = error.error_count() - len(found)
        raise UsageError("\n".join([*found, *([f"{source}: {more} more errors"] if more else [])])) from None


def _explain(schema: type[BaseModel], error: Any) -> str:
    key = ".".join(_SHORT.repr(part) if len(str(part)) > 80 else str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{did_you_mean(key, schema.model_fields)}"
    if error["type"] == "literal_error":
        choices = [choice.strip(" '") for choice in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
        given = _SHORT.repr(error["input"])
        return f"{key} is {given}.{did_you_mean(given[1:-1], choices)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key} is {_SHORT.repr(error['input'])}: {message}" if key else message
