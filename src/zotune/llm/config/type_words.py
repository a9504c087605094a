"""What the value of an option may be, in words, from the option's type and bounds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

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
