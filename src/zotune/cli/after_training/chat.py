"""`zotune chat`: a chat in the terminal, whose answers appear while they are generated.

Without a terminal each line that is piped in is a message, and the answers follow each other on standard output.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from zotune.cli.help import HelpPage, help_text
from zotune.cli.options import complete, is_help, parse
from zotune.cli.output import print_json, print_message, print_piece, print_text
from zotune.errors import UsageError, did_you_mean
from zotune.llm.config.generate import ChatConfig
from zotune.messages import say

if TYPE_CHECKING:
    from zotune.llm.inference.conversation import Conversation

_COMMANDS = {
    "/reset": "begin a new chat",
    "/system": "begin a new chat with another system text: /system You answer in one sentence.",
    "/help": "show these commands (a message that begins with / gets a space before it)",
    "/exit": "leave",
}
_PAGE = HelpPage(
    usage="zotune chat [--OPTION VALUE ...]",
    description="Chat with a model in the terminal, by its chat template. "
    f"Commands in the chat: {', '.join(_COMMANDS)}. Ctrl-C stops an answer; once more, it leaves.",
    examples=(
        "zotune chat --model runs/latest",
        'zotune chat --system-prompt "You answer in one sentence." --temperature 0.7',
        "zotune chat --model runs/latest < questions.txt",
    ),
)
_PROMPT = "> "


def run(args: list[str], as_json: bool) -> int:
    """Chat and return the exit code."""
    if is_help(args):
        print_text(help_text(_PAGE, ChatConfig, complete(ChatConfig, {}, "defaults")))
        return 0
    config = parse(ChatConfig, {}, "command line", args, "zotune chat")
    from zotune.llm.inference.conversation import Conversation
    from zotune.llm.models.load import load
    from zotune.llm.output.locked_folder import tidy

    tidy(Path(config.model))
    chat = Conversation(load(config), config)
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if is_terminal:
        say(f"chatting with {config.model}; /help shows the commands, Ctrl-C stops an answer")
    write = (lambda text: None) if as_json else print_piece
    code = _talk(chat, _messages(is_terminal), write, is_terminal)
    if as_json:
        print_json({"messages": chat.messages, "system": chat.system, "config": config.model_dump(mode="json")})
    return code


def _messages(is_terminal: bool) -> Iterator[str]:
    """Yield what the user writes, a line a message."""
    if not is_terminal:
        yield from sys.stdin or ()
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - it lets `input` edit lines and remember them
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            return


def _talk(chat: Conversation, messages: Iterator[str], write: Callable[[str], None], is_terminal: bool) -> int:
    """Answer each message until the user leaves; return the exit code."""
    for line in messages:
        if line.startswith("/"):
            if not _obey(chat, line.strip()):
                return 0
            continue
        try:
            stopped_by = _answer(chat, line.strip(), write) if line.strip() else 0
        except UsageError as error:
            if not is_terminal:
                raise
            print_message(str(error))
            continue
        if stopped_by == signal.SIGTERM or (stopped_by and not is_terminal):
            return 128 + stopped_by
    return 0


def _answer(chat: Conversation, text: str, write: Callable[[str], None]) -> int:
    """Let the model answer a message; return the signal that stopped the answer, or 0."""
    from zotune.llm.scoring.streaming import Stream
    from zotune.llm.training.signals import signal_handler

    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    with signal_handler(note):
        chat.answer(text, Stream(write, lambda: bool(received)))
    write("\n")
    if received:
        say("the answer was stopped; Ctrl-C leaves")
    return received[0] if received else 0


def _obey(chat: Conversation, text: str) -> bool:
    """Carry out a command of the chat; return whether the chat goes on."""
    name, _, rest = text.partition(" ")
    if name == "/exit":
        return False
    if name == "/reset":
        chat.reset()
        say("a new chat")
    elif name == "/system":
        chat.reset()
        chat.system = rest.strip() or None
        say("a new chat, with the system text" if chat.system else "a new chat, without a system text")
    elif name == "/help":
        say("\n".join(f"  {command:<8} {what}" for command, what in _COMMANDS.items()))
    else:
        say(f"there is no command {name!r} in a chat.{did_you_mean(name, _COMMANDS)}")
    return True
