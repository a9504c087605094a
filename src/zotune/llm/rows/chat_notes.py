"""What a chat template makes of the options of chats, and of messages of the system: checks and remarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.data.examples import Example
from zotune.llm.data.in_chat import system_message
from zotune.llm.data.template_sources import CHATML
from zotune.llm.rows.records import Chat, Record
from zotune.llm.rows.rendering import chat_template_of, has_chat_template

_CHATML_END = "<|im_end|>"


def check_chat_options(options: DataOptions, examples: Sequence[Example], tokenizer: Any) -> None:
    """Check that the options of chats have an effect on the rows.

    Raises:
        UsageError: no row is written by a chat template, or the template leaves out the message of the system.
    """
    given = next((name for name in ("chat_template", "system_prompt") if getattr(options, name) is not None), None)
    if given is not None and not any(e.spans or e.rendered for e in examples):
        raise UsageError(
            f"{given} has no effect on these rows (data_format: {options.data_format}), which no chat template writes. "
            "Leave it out, or give --apply-chat-template."
        )
    if options.system_prompt is None:
        return
    made_of_it = system_message(chat_template_of(options, tokenizer))
    if made_of_it != "written":
        reason = "leaves out messages of the system" if made_of_it == "left out" else f"refuses them: {made_of_it}"
        raise UsageError(
            f"--system-prompt has no effect: the chat template {reason.rstrip('.')}. Leave it out and write the text "
            "into the messages of the user, or give another --chat-template."
        )


def template_notes(options: DataOptions, records: Iterable[Record], tokenizer: Any) -> list[str]:
    """Say what a chat template does that nobody sees in the rows."""
    notes = []
    is_chatml = options.chat_template is not None and options.chat_template.endswith(CHATML)
    if is_chatml and _CHATML_END not in tokenizer.get_vocab():
        notes.append(
            f"the tokenizer has no token {_CHATML_END}, so it is read as plain text, and generated text does not "
            "end there; --chat-template plain ends answers with the end-of-text token"
        )
    if not has_chat_template(tokenizer) or system_message(chat_template_of(options, tokenizer)) != "left out":
        return notes
    every = [record for record in records if isinstance(record, Chat)]
    num_left_out = sum(any(m["role"] in ("system", "developer") for m in record.messages) for record in every)
    if num_left_out:
        notes.append(
            f"the chat template leaves out the messages of the system, which {num_left_out} of {len(every)} chats have"
        )
    return notes
