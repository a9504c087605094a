"""Chat templates in place of the tokenizer's own: from a file or a folder, by a name, or written out."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from zotune.errors import UsageError, did_you_mean, reason_of
from zotune.llm.data.chat_template import names_used
from zotune.system.bounds import RECIPE_BYTES, read_bytes

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}Assistant: {{ message['content'] }}"
    "{{ eos_token }}\n{% elif message['role'] == 'user' %}User: {{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
NAMED = {"chatml": CHATML, "plain": PLAIN}
"""The templates that zotune has by name: ChatML, and one of plain words for models without tokens of chats."""

# Where a folder of a tokenizer keeps its template, the file of today first.
_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_MARK = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def with_template(tokenizer: Any, given: str) -> Any:
    """Return a copy of a tokenizer with another chat template; the tokenizer itself stays as it is.

    Args:
        tokenizer: a tokenizer of transformers.
        given: the path of a template or of a tokenizer's folder, a name (one of `NAMED`, or of the tokenizer's own
            templates), or the text of a template.

    Raises:
        UsageError: there is no such file or name, or what it holds is no template for chats.
    """
    found = copy.copy(tokenizer)
    found.chat_template = template_source(given, tokenizer)
    return found


def template_source(given: str, tokenizer: Any) -> str:
    """Return the text of the chat template that is given as for `with_template`.

    Raises:
        UsageError: as `with_template`.
    """
    own = getattr(tokenizer, "chat_template", None)
    named = dict(own) if isinstance(own, dict) else {}
    if "{{" in given or "{%" in given:
        name, source = "the chat template", given
    elif given in named:
        name, source = f"the chat template {given}", named[given]
    elif given in NAMED:
        name, source = f"the chat template {given}", _begin(tokenizer) + NAMED[given]
    else:
        name, source = given, _from_path(Path(given), [*named, *NAMED])
    _check(source, name)
    return source


def _begin(tokenizer: Any) -> str:
    """Return what begins each chat: the beginning-of-sequence token, if the tokenizer begins a text with it."""
    begin = tokenizer.bos_token_id
    return "{{ bos_token }}" if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else ""


def _from_path(path: Path, names: list[str]) -> str:
    try:
        if path.is_dir():
            return _from_folder(path)
        if path.is_file():
            return _text(path)
    except OSError as error:
        raise UsageError(f"the chat template {path} cannot be read: {reason_of(error)}.") from None
    raise UsageError(
        f"--chat-template {str(path)[:200]!r} is no file, no folder and no name of a template."
        f"{did_you_mean(str(path)[:200], names)} A template of chats is written in Jinja, with {{% for message in "
        "messages %}; the prompt of rows, with {column}, is --template."
    )


def _text(path: Path) -> str:
    try:
        return read_bytes(path, RECIPE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"the chat template {path} is not UTF-8 text ({error.reason}).") from None


def _from_folder(folder: Path) -> str:
    """Return the template of a tokenizer in a folder."""
    for name in _FILES:
        if not (folder / name).is_file():
            continue
        text = _text(folder / name)
        if name.endswith(".jinja"):
            return text
        try:
            source = json.loads(text).get("chat_template")
        except (ValueError, AttributeError, RecursionError) as error:
            raise UsageError(f"{folder / name} is not valid JSON ({reason_of(error)}).") from None
        if isinstance(source, str) and source:
            return source
    raise UsageError(
        f"the folder {folder} has no chat template: none of {', '.join(_FILES)} holds one. Name another folder, or the "
        "file of a template."
    )


def _check(source: str, name: str) -> None:
    """Check that a text is a template for chats.

    Raises:
        UsageError: it is not.
    """
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARK.sub("", source))
    except TemplateSyntaxError as error:
        raise UsageError(f"{name}, line {error.lineno}: no valid template of Jinja ({error.message}).") from None
    if "messages" not in names_used(source):
        raise UsageError(
            f"{name} does not read the messages, so every chat would be the same text. A template of chats has "
            "{% for message in messages %}; the prompt of rows, with {column}, is --template."
        )
