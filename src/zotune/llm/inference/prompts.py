"""From what a person typed, or keeps in a file, to rows of prompts that the model reads as it read those of its tuning.

A model that was tuned on chats reads a text as the user's message in a chat; one that was tuned on rows with a template
reads it in the column that the template names. Any other model reads it as a chat if it has a chat template, else as it
stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zotune.errors import UsageError, listed
from zotune.llm.config.data import IN_MEMORY
from zotune.llm.config.generate import ChatConfig, GenerateConfig
from zotune.llm.config.run import EvalConfig, inherited_options
from zotune.llm.config.schema import validate
from zotune.llm.config.step import ModelOptions
from zotune.llm.data.readers import LocatedRow, read_located_rows
from zotune.llm.inference.answers import REWARD
from zotune.llm.tasks.row_formats import FORMATS, template_columns
from zotune.llm.tasks.user_data import Rows
from zotune.messages import say
from zotune.system.bounds import DATA_BYTES, read_bytes

Message = Mapping[str, Any]

_TEXT_FILES = ("", ".txt", ".md")
# Options of a run that say how its rows are read; the others say what is learnt of them.
_OF_PROMPTS = ("text_column", "columns", "template", "chat_date", "read_control_tokens", "max_length")


@dataclass(frozen=True)
class PromptStyle:
    """How a model reads prompts.

    Attributes:
        is_chat: whether a text is the user's message in a chat.
        template: the template that a text is put into, if it is no chat.
        columns: the columns that the template names, under the names of the rows.
        options: the options of rows that come with it.
    """

    is_chat: bool
    template: str = "{prompt}"
    columns: tuple[str, ...] = ("prompt",)
    options: Mapping[str, Any] = field(default_factory=dict)

    def row(self, text: str, system: str | None = None) -> dict[str, Any]:
        """Return the row of a text."""
        if self.is_chat:
            return {"messages": [*system_messages(system), {"role": "user", "content": text}]}
        return {self.columns[0]: text}


def system_messages(text: str | None) -> list[Message]:
    """Return the messages at the start of a chat: one with the system's text, if there is one."""
    return [] if text is None else [{"role": "system", "content": text}]


def style_of(options: ChatConfig, tokenizer: Any, *, as_chat: bool | None = None) -> PromptStyle:
    """Return how a model reads prompts: as in its training, if zotune tuned it on rows.

    Args:
        options: the model, and how prompts are read.
        tokenizer: its tokenizer, perhaps with a chat template.
        as_chat: whether texts are chats, or prompts as they stand; None: as in the training, else chats if there is a
            chat template.

    Raises:
        UsageError: the options of the training cannot be read.
    """
    run, source = inherited_options(_config(options, {}))
    form = str(run.get("data_format"))
    inherited = {name: run[name] for name in _OF_PROMPTS if run.get(name) is not None}
    template = inherited.pop("template", None) or getattr(FORMATS.get(form), "template", None)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    was_chat = template is None if run else has_template
    if as_chat or (as_chat is None and was_chat):
        if run and not was_chat:
            say(
                f"{source}: the model was tuned on prompts with the template {template!r}, and reads chats as its base "
                "model does"
            )
        return PromptStyle(True, options=inherited)
    if template is None or as_chat is False:
        return PromptStyle(False, options={k: v for k, v in inherited.items() if k not in ("columns", "text_column")})
    config = _config(options, inherited)
    names = {"text": config.text_column, **config.columns}
    columns = tuple(names.get(name, name) for name in template_columns(template))
    return PromptStyle(False, template, columns, inherited)


def eval_config(options: ChatConfig, style: PromptStyle) -> EvalConfig:
    """Return the options of an evaluation that generates text after prompts of a style."""
    form = {"data_format": "chat"} if style.is_chat else {"data_format": "prompt", "template": style.template}
    return _config(options, {**style.options, **form})


def _config(options: ChatConfig, more: Mapping[str, Any]) -> EvalConfig:
    names = [name for name in ModelOptions.model_fields if name in options.model_fields_set]
    values = {name: getattr(options, name) for name in (*names, "max_new_tokens")}
    given = {name: getattr(options, name) for name in ("max_length", "read_control_tokens") if getattr(options, name)}
    if options.samples:
        drawn = {name: getattr(options, name) for name in ("temperature", "top_p")}
        values |= {"generation": "sample", **{name: value for name, value in drawn.items() if value is not None}}
    batch = {"per_device_eval_batch_size": getattr(options, "per_device_eval_batch_size", 1)}
    fixed = {"objective": REWARD, "data_source": IN_MEMORY, "stop_at": getattr(options, "stop_at", "end")}
    return validate(EvalConfig, {**values, **more, **given, **batch, **fixed}, "command line")


def prompt_rows(options: GenerateConfig, style: PromptStyle, stdin: str | None) -> tuple[Rows, bool]:
    """Return the rows of the prompts that the options name, and whether they are chats.

    Args:
        options: prompts, or a file of them.
        style: how the model reads prompts.
        stdin: the text on standard input, if that is read.

    Raises:
        UsageError: there is no prompt, the file cannot be read, or a row has no prompt.
    """
    file = options.prompt_file
    if file is None or str(file) == "-" or file.suffix in _TEXT_FILES:
        texts = _texts(options, stdin)
        _check_one_column(style)
        rows = [LocatedRow(place, style.row(text, options.system_prompt)) for place, text in texts]
        return Rows("prompts" if file is None else file, rows), style.is_chat
    located = [_row(row, options, style) for row in read_located_rows(file, split="test")]
    if not located:
        raise UsageError(f"{file} contains no row.")
    chats = ["messages" in row.columns for row in located]
    if len(set(chats)) > 1:
        odd = located[chats.index(not chats[0])]
        raise UsageError(f"{odd.place}: some rows of the file are chats and others are not; keep them in two files.")
    return Rows(file, located), chats[0]


def _texts(options: GenerateConfig, stdin: str | None) -> list[tuple[str, str]]:
    """Return the places and texts of the prompts.

    Raises:
        UsageError: there is none, or the file cannot be read.
    """
    file = options.prompt_file
    if options.prompt:
        found = [(f"prompt {i}", text) for i, text in enumerate(options.prompt, start=1)]
    elif file is None:
        found = [("standard input", (stdin or "").strip("\n"))]
    else:
        lines = (stdin or "") if str(file) == "-" else _content(file)
        name = "standard input" if str(file) == "-" else file
        numbered = enumerate(lines.splitlines(), start=1)
        found = [(f"{name}, line {i}", line) for i, line in numbered if line.strip()]
    if not found:
        raise UsageError(f"{file or 'standard input'} contains no prompt: write one a line.")
    empty = next((place for place, text in found if not text.strip()), None)
    if empty is not None:
        raise UsageError(f'{empty} is empty: give a prompt, for instance --prompt "Where is my order?".')
    return found


def _content(file: Path) -> str:
    try:
        return read_bytes(file, DATA_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"--prompt-file {str(file)!r} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"--prompt-file {str(file)!r} is not UTF-8 text; save it as UTF-8.") from None


def _check_one_column(style: PromptStyle) -> None:
    if not style.is_chat and len(style.columns) > 1:
        raise UsageError(
            f"the model was tuned on prompts of several columns, {style.template!r}: give rows with "
            f"{', '.join(style.columns)} as --prompt-file rows.jsonl, or a prompt as it stands with "
            "--prompt-format plain."
        )


def _row(row: LocatedRow, options: GenerateConfig, style: PromptStyle) -> LocatedRow:
    """Return a row of the file as the row of a prompt: with messages, or with the columns of the style's template."""
    columns = row.columns
    messages = style.options.get("columns", {}).get("messages", "messages")
    if options.template is None and columns.get(messages) is not None:
        given = columns[messages]
        is_open = isinstance(given, list) and not any(isinstance(m, dict) and m.get("role") == "system" for m in given)
        return LocatedRow(
            row.place, {"messages": [*system_messages(options.system_prompt), *given] if is_open else given}
        )
    if options.template is None and not style.is_chat and all(columns.get(name) is not None for name in style.columns):
        return LocatedRow(row.place, {name: columns[name] for name in style.columns})
    _check_one_column(style)
    return LocatedRow(row.place, style.row(_text_of(row, options.template), options.system_prompt))


def _text_of(row: LocatedRow, template: str | None) -> str:
    """Return the text of a row's prompt."""
    names: Sequence[str] = ("prompt", "text") if template is None else template_columns(template)
    present = [name for name in names if row.columns.get(name) is not None]
    if not present or (template is not None and len(present) < len(names)):
        missing = next(name for name in names if name not in present)
        raise UsageError(
            f"{row.place}: there is no column {missing!r}; the row has {listed(row.columns, 10)}. Name the columns of "
            "the prompt with --template '{column} …'."
        )
    if template is None:
        return str(row.columns[present[0]])
    return template.format_map({name: str(row.columns[name]) for name in names})
