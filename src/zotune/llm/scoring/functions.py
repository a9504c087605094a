"""Functions of the user that judge completions, named `module:function`: importing them, and calling them.

A function is given a list of completions, and of the row's columns those that it names as arguments, each as a list
with a value per completion; all of them if it takes `**kwargs`, as reward functions of TRL do.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from zotune.errors import UsageError, did_you_mean, listed

# Arguments that hold something of the completions and no column.
_OWN = ("completions", "prompts")


@dataclass(frozen=True)
class Completion:
    """A text generated from a prompt, or the candidate that a model chose.

    Attributes:
        prompt: the prompt as text.
        text: the generated text without surrounding white space.
        references: the accepted answers of the row, or the right candidate's text; empty if the row has none.
        columns: the columns of the row that the function takes.
    """

    prompt: str
    text: str
    references: tuple[str, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def reference(self) -> str:
        """The first reference; empty if there is none."""
        return self.references[0] if self.references else ""


def load_function(name: str, option: str) -> Callable[..., Any]:
    """Import the function `module:function` that an option names, from the current folder or the Python path.

    The user names it, so the current folder comes first while the module is imported. Afterwards it comes last: what
    the module imports later is found there, but nothing there takes the place of a library.

    Raises:
        UsageError: the module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    try:
        with _first_place_of_modules(here):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(f"{option} {name}: importing {module_name} failed, {where_raised(error)}.") from error
        raise UsageError(
            f"{option} {name}: there is no module {module_name!r} in the current folder ({here}) or on the Python "
            f"path. Run from the folder that holds {module_name.replace('.', '/')}.py, or add it to PYTHONPATH."
        ) from None
    except Exception as error:
        raise UsageError(f"{option} {name}: importing {module_name} failed, {where_raised(error)}.") from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if function is None or not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(
            f"{option} {name}: {getattr(module, '__file__', module_name)} has no function {function_name!r}."
            + did_you_mean(function_name, known)
        )
    return function


@contextmanager
def _first_place_of_modules(folder: str) -> Iterator[None]:
    """Within this context look for modules in a folder first, and last from then on."""
    is_new = folder not in sys.path
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if is_new:
            sys.path.append(folder)


def columns_taken(function: Callable[..., Any], columns: Iterable[str], name: str) -> tuple[str, ...]:
    """Return which of the rows' columns a function takes as keyword arguments.

    Args:
        function: the function of the user.
        columns: the columns that the rows have.
        name: the function's name, for errors.

    Raises:
        UsageError: it needs an argument that is no column.

    >>> def reward(completions, solution, weight=1, **others): ...
    >>> columns_taken(reward, ("prompt", "solution"), "m:reward")
    ('prompt', 'solution')
    >>> columns_taken(lambda batch: [], ("prompt",), "m:f")
    ()
    """
    known, taken = tuple(columns), _signature_of(function)
    missing = next((key for key in taken.needed if key not in (*known, *_OWN)), None)
    if missing is not None:
        raise UsageError(
            f"{name} takes the column {missing!r}, which the rows do not have.{did_you_mean(missing, known)} "
            f"The columns are: {listed(known, 20)}."
        )
    return tuple(filter(taken.takes, known))


def call(function: Callable[..., Any], completions: Sequence[Completion]) -> Any:
    """Call a function of completions with the columns that it takes, each as a list with a value per completion."""
    taken = _signature_of(function)
    keys = filter(taken.takes, dict.fromkeys(key for completion in completions for key in completion.columns))
    arguments: dict[str, Any] = {key: [c.columns.get(key) for c in completions] for key in keys}
    if "prompts" in taken.named:
        arguments["prompts"] = [c.prompt for c in completions]
    if "completions" in taken.named:
        return function(completions=completions, **arguments)
    return function(completions, **arguments)


class _Signature(NamedTuple):
    """The keyword arguments of a function of completions.

    Attributes:
        first: the name of the argument that takes the completions by its place; empty if `completions` is a keyword.
        named: the other arguments; needed: those of them without a default.
        takes_others: whether any other keyword may be given.
    """

    first: str = ""
    named: frozenset[str] = frozenset()
    needed: tuple[str, ...] = ()
    takes_others: bool = False

    def takes(self, column: str) -> bool:
        """Return whether a column is given to the function."""
        return column not in (self.first, *_OWN) and (self.takes_others or column in self.named)


def _signature_of(function: Callable[..., Any]) -> _Signature:
    try:
        every = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a function that is not written in Python
        return _Signature()
    named = [p for p in every if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    first = ""
    if "completions" not in (p.name for p in named) and named[:1] == every[:1] and named:
        first, named = named[0].name, named[1:]
    return _Signature(
        first,
        frozenset(p.name for p in named),
        tuple(p.name for p in named if p.default is p.empty),
        any(p.kind is p.VAR_KEYWORD for p in every),
    )


def shown(value: object) -> str:
    """Return a value of a user's function as short text, with its type."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({type(value).__name__})"


def where_raised(error: BaseException) -> str:
    """Return the error with the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    return f"{place}{type(error).__name__}: {error}"
