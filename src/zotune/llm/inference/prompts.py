"""From what a person typed, or keeps in a file, to rows of prompts that the model reads as it read those of its tuning.

A model that was tuned on chats reads a text as the user's message in a chat; one that was tuned on instructions, as an
instruction; one that was tuned on rows with a template, in the column that the template names. Any other model reads it
as a chat if it has a chat template, else as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zotune.errors import UsageError, listed
from zotune.llm.checkpoints.adapter_source import folder_of_run
from zotune.llm.config.data import IN_MEMORY
from zotune.llm.config.generate import ChatConfig, GenerateConfig
from zotune.llm.config.run import EvalConfig, inherited_options
from zotune.llm.config.schema import validate
from zotune.llm.config.step import ModelOptions
from zotune.llm.data.readers import LocatedRow, read_located_rows
from zotune.llm.inference.answers import REWARD
from zotune.llm.rows.cells import column_of
from zotune.llm.rows.messages import holds_messages, messages_of
from zotune.llm.rows.rendering import has_chat_template
from zotune.llm.rows.shapes import SHAPES
from zotune.llm.rows.sources import Rows
from zotune.llm.rows.templates import template_columns
from zotune.messages import say
from zotune.system.bounds import DATA_BYTES, read_bytes

Form = Literal["chat", "alpaca", "prompt"]

_TEXT_FILES = ("", ".txt", ".md")
# Options of a run that say how its rows are read; the others say what is learnt of them.
_OF_PROMPTS = (
    *("text_column", "columns", "template", "chat_date", "read_control_tokens"),
    *("apply_chat_template", "system_prompt"),
)
# Those that say what a prompt is made of, not read where it stands as it is.
_OF_FORMS = ("columns", "text_column", "template", "apply_chat_template", "system_prompt")
# Rows of instructions need an output, which is not read here.
_NO_OUTPUT = "-"


@dataclass(frozen=True)
class PromptStyle:
    """How a model reads prompts.

    Attributes:
        form: whether a text is the user's message in a chat, an instruction, or the text of a template.
        config: the options by which rows of this form become prompts.
    """

    form: Form
    config: EvalConfig

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a text may be in, under their names in the rows."""
        roles = {"chat": ("messages",), "alpaca": ("instruction",)}.get(self.form)
        return tuple(self.column(role) for role in roles or template_columns(self.config.template or "{prompt}"))

    def column(self, role: str) -> str:
        """Return the name in the rows of the column of a role."""
        return column_of(role, self.config)

    def row(self, text: str, system: str | None = None) -> dict[str, Any]:
        """Return the row of a text."""
        if self.form == "chat":
            return {self.column("messages"): [*system_messages(system), {"role": "user", "content": text}]}
        if self.form == "alpaca":
            return self.instruction({self.column("instruction"): text}, system)
        return {self.columns[0]: text}

    def instruction(self, columns: Mapping[str, Any], system: str | None) -> dict[str, Any]:
        """Return the row of an instruction, whose output is to be generated."""
        told = {} if system is None else {self.column("system"): system}
        return {**told, **columns, self.column("output"): _NO_OUTPUT}


def told_columns(row: LocatedRow, config: EvalConfig) -> dict[str, Any]:
    """Return the columns of a prompt's row, without the one that stands for the output of an instruction."""
    stand_in = column_of("output", config) if config.data_format == "alpaca" else None
    return {name: value for name, value in row.columns.items() if name != stand_in}


def system_messages(text: str | None) -> list[dict[str, Any]]:
    """Return the messages at the start of a chat: one with the system's text, if there is one."""
    return [] if text is None else [{"role": "system", "content": text}]


def style_of(options: ChatConfig, tokenizer: Any, form: Literal["auto", "chat", "plain"] = "auto") -> PromptStyle:
    """Return how a model reads prompts: as in its training, if zotune tuned it on rows.

    Args:
        options: the model, and how prompts are read.
        tokenizer: its tokenizer, perhaps with a chat template.
        form: `chat` or `plain` for texts as chats or as they stand, whatever the training was.

    Raises:
        UsageError: the options of the training cannot be read.
    """
    folder = folder_of_run(options.model, options.model_revision)
    run, source = inherited_options(_config(options, {}), folder)
    known = {name: run[name] for name in _OF_PROMPTS if run.get(name) is not None}
    if known.get("apply_chat_template") and options.system_prompt is not None:
        known["system_prompt"] = options.system_prompt
    trained = _form_of(run) if run else "chat" if has_chat_template(tokenizer) else "prompt"
    if form == "plain" or (form == "auto" and trained == "prompt" and not run):
        without = {k: v for k, v in known.items() if k not in _OF_FORMS}
        return PromptStyle("prompt", _config(options, {**without, "data_format": "prompt", "template": "{prompt}"}))
    in_chat = trained == "chat" or (trained == "alpaca" and run.get("template") is None)
    if run and form == "chat" and not (in_chat and has_chat_template(tokenizer)):
        say(f"{source}: the model was tuned on other prompts than chats, and reads these as its base model does")
    chosen: Form = "chat" if form == "chat" else trained
    template = known.get("template") or getattr(SHAPES.get(str(run.get("data_format"))), "template", None)
    # A chat has the template of the tokenizer, an instruction one of its own unless the run had another.
    more = {"data_format": chosen, "template": {"chat": None, "alpaca": known.get("template")}.get(chosen, template)}
    return PromptStyle(chosen, _config(options, {**known, **more}))


def _form_of(run: Mapping[str, Any]) -> Form:
    """Return the form in which a run's rows were read; prompts of messages had no template."""
    if run.get("data_format") in ("completion", "prompt") and run.get("template") is None:
        return "chat"
    return {"chat": "chat", "sharegpt": "chat", "alpaca": "alpaca"}.get(str(run.get("data_format")), "prompt")  # type: ignore[return-value]


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


def prompt_rows(options: GenerateConfig, style: PromptStyle, stdin: str | None) -> tuple[Rows, EvalConfig]:
    """Return the rows of the prompts that the options name, and the options by which they become prompts.

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
        return Rows("prompts" if file is None else file, rows), style.config
    found = [_row(row, options, style) for row in read_located_rows(file, split="test")]
    if not found:
        raise UsageError(f"{file} contains no row.")
    forms = [form for form, _ in found]
    if len(set(forms)) > 1:
        place = next(row.place for form, row in found if form != forms[0])
        raise UsageError(f"{place}: the rows of the file are of several forms ({', '.join(sorted(set(forms)))}).")
    plain = {"data_format": forms[0], "template": style.config.template if forms[0] == style.form else None}
    return Rows(file, [row for _, row in found]), style.config.model_copy(update=plain)


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
    if len(style.columns) > 1:
        raise UsageError(
            f"the model was tuned on prompts of several columns, {style.config.template!r}: give rows with "
            f"{', '.join(style.columns)} as --prompt-file rows.jsonl, or a prompt as it stands with "
            "--prompt-format plain."
        )


def _row(row: LocatedRow, options: GenerateConfig, style: PromptStyle) -> tuple[Form, LocatedRow]:
    """Return a row of the file as the row of a prompt, and its form."""
    columns, system = row.columns, options.system_prompt
    if options.template is None:
        for name in (style.column("messages"), style.column("conversations"), style.column("prompt")):
            if holds_messages(row, name):
                messages = [*messages_of(row, name)]
                begins = [] if messages[0]["role"] == "system" else system_messages(system)
                tools = {name: columns[name] for name in (style.column("tools"),) if columns.get(name) is not None}
                return "chat", LocatedRow(row.place, {style.column("messages"): [*begins, *messages], **tools})
        if style.form == "prompt" and all(columns.get(name) is not None for name in style.columns):
            return "prompt", LocatedRow(row.place, {name: columns[name] for name in style.columns})
        if style.form != "prompt" and columns.get(style.column("instruction")) is not None:
            return "alpaca", LocatedRow(row.place, style.instruction(columns, system))
    _check_one_column(style)
    return style.form, LocatedRow(row.place, style.row(_text_of(row, options.template), system))


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
