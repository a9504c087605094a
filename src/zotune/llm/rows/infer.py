"""Finding the shape of rows from their columns, and the shape that is nearest where none fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers import ClassNumber, LocatedRow
from zotune.llm.rows.cells import column_of
from zotune.llm.rows.labels import check_words, labels_as_words
from zotune.llm.rows.messages import holds_messages
from zotune.llm.rows.nearest import is_named_like, nearest_shape
from zotune.llm.rows.shapes import PLAIN_TEXT, PROMPT_ALONE, SHAPES

# Options that only some shapes use.
_SHAPE_OPTIONS = ("template", "verbalizer", "exact_match", "scored_turns", "chat_date", "packing")
# Options of answers, which a text alone has none of.
_OF_ANSWERS = ("apply_chat_template", "system_prompt", "chat_template", "compute_metrics")


def resolve_shape(options: DataOptions, rows: Sequence[LocatedRow], source: str | Path) -> DataOptions:
    """Return the options with the rows' shape, template and verbalizer filled in.

    Raises:
        UsageError: the shape cannot be inferred, or an option has no effect on it.
    """
    if not rows:
        raise UsageError(f"{source} contains no row.")
    name = options.data_format or _infer(rows, options, source)
    shape = SHAPES[name]
    for option in _SHAPE_OPTIONS:
        if option not in shape.uses and getattr(options, option) != type(options).model_fields[option].get_default(
            call_default_factory=True
        ):
            users = " or ".join(other for other, one in SHAPES.items() if option in one.uses)
            raise UsageError(f"{option} has no effect on rows of {shape.description} ({name}); it is for {users}.")
    idle = next((option for option in _OF_ANSWERS if name == PLAIN_TEXT and getattr(options, option)), None)
    if idle is not None:
        raise UsageError(f"{idle} has no effect on rows of {shape.description} ({name}), which have no answers.")
    if name == PROMPT_ALONE and not options.is_function:
        raise UsageError(
            f"rows of {shape.description} ({name}) contain no right answer: give --objective MODULE:FUNCTION, "
            "a reward function of generated text, or another --data-format."
        )
    template = options.template or _default_template(name, rows, options)
    words = options.verbalizer
    if name == "classification":
        words = words or labels_as_words(rows, options, source)
        check_words(words)
    return options.model_copy(update={"data_format": name, "template": template, "verbalizer": words})


def check_masked(options: DataOptions) -> None:
    """Check that a masked language model can learn rows of the options' shape.

    Raises:
        UsageError: it cannot.
    """
    if options.data_format != "classification":
        raise UsageError(
            f"a masked language model fills in one word, so it cannot learn from "
            f"{SHAPES[options.data_format or ''].description} ({options.data_format}). "
            "Use a causal language model, or rows with a text and a label."
        )


def _default_template(name: str, rows: Sequence[LocatedRow], options: DataOptions) -> str | None:
    """Return the default template of a shape, which is none for prompts of messages: the chat template writes these.

    For a prompt alone it is the prompt column or the text column.
    """
    prompt = column_of("prompt", options)
    if name == PROMPT_ALONE and prompt not in columns_with_values(rows):
        return "{text}"
    if name in ("completion", PROMPT_ALONE) and holds_messages(rows[0], prompt):
        return None
    return SHAPES[name].template


def columns_with_values(rows: Iterable[LocatedRow]) -> list[str]:
    """Return the columns that have a value in some row, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name, value in row.columns.items() if value is not None))


def unread_columns(rows: Sequence[LocatedRow], options: DataOptions) -> list[str]:
    """Return the columns of rows that rows of the options' shape do not need and do not read."""
    read = set(SHAPES[options.data_format or ""].columns_read(options))
    # `datasets` adds the name of a class beside its number.
    read |= {f"{name}_name" for name, value in rows[0].columns.items() if isinstance(value, ClassNumber)}
    return [name for name in columns_with_values(rows) if name not in read]


def _infer(rows: Sequence[LocatedRow], options: DataOptions, source: str | Path) -> str:
    """Infer the shape from the columns; for a reward function it is a chat or a prompt alone.

    Raises:
        UsageError: the columns fit no shape, or several.
    """
    present = columns_with_values(rows)
    if options.is_function:
        return _of_prompts(present, options)
    fitting = [name for name in SHAPES if name not in (PROMPT_ALONE, PLAIN_TEXT) and _fits(name, present, options)]
    if not fitting and _is_text_alone(present, options):
        return PLAIN_TEXT
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UsageError(
            f"{source}: the columns {', '.join(sorted(present))} fit several formats: {', '.join(fitting)}. "
            f"Choose one, for instance with --data-format {fitting[0]}."
        )
    raise UsageError(f"{source}: {nearest_shape(present, options)}{_list_within(rows)}")


def _list_within(rows: Sequence[LocatedRow]) -> str:
    """Return a hint if the only row is an object around the list of rows, as in `{"version": 1, "data": [{…}, …]}`."""
    columns = rows[0].columns if len(rows) == 1 else {}
    names = [name for name, v in columns.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    return f" If the list {names[0]!r} holds the rows, write this list alone into the file." if names else ""


def _is_text_alone(present: Sequence[str], options: DataOptions) -> bool:
    """Return whether rows have a text, and neither a label of another name nor options that ask for one."""
    asked = options.verbalizer or options.columns or options.label_column != "label"
    others = [name for name in present if name != options.text_column]
    return options.text_column in present and not asked and not any(is_named_like("label", name) for name in others)


def _of_prompts(present: Sequence[str], options: DataOptions) -> str:
    """Return the shape of rows for a reward function."""
    chats = [name for name in ("chat", "sharegpt") if _fits(name, present, options)]
    if chats:
        return chats[0]
    has_prompt = column_of("prompt", options) in present or options.template is not None
    return "alpaca" if not has_prompt and _fits("alpaca", present, options) else PROMPT_ALONE


def _fits(name: str, present: Sequence[str], options: DataOptions) -> bool:
    """Return whether rows with these columns may be of a shape: none is missing, or named as another role's."""
    shape = SHAPES[name]
    elsewhere = {column for role, column in options.columns.items() if role not in (*shape.roles, *shape.optional)}
    is_there = all(column in present for column in shape.columns(options))
    return is_there and not any(column_of(role, options) in elsewhere for role in shape.roles)
