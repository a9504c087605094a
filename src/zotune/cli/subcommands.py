"""The parser of verbs that have commands of their own (`zotune bench run`, `zotune ledger show`)."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from zotune.cli.output import print_json, print_text
from zotune.errors import UsageError, did_you_mean

# A command's result as JSON and as text, and its exit code.
CommandResult = tuple[Any, str, int]
Command = Callable[[argparse.Namespace], CommandResult]


class HelpFormatter(argparse.HelpFormatter):
    """Help whose descriptions begin in the same column as those of the other verbs."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


class CommandParser(argparse.ArgumentParser):
    """The parser of one command, with the headings of the other verbs' help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=HelpFormatter)
        self._positionals.title, self._optionals.title = "Arguments", "Options"


class VerbParser(argparse.ArgumentParser):
    """A parser of a verb's commands; it suggests the nearest command or option for a misspelt one."""

    def __init__(self, prog: str, description: str, examples: Sequence[str]) -> None:
        super().__init__(prog=prog, description=description, usage=f"{prog} COMMAND [--OPTION VALUE ...]")
        self._examples = examples
        self._commands_action = self.add_subparsers(
            metavar="COMMAND", dest="command", required=True, prog=prog, parser_class=CommandParser
        )

    @property
    def commands(self) -> dict[str, CommandParser]:
        """The parsers of the commands by name."""
        return dict(self._commands_action.choices)

    def add_command(self, name: str, run: Command, text: str) -> CommandParser:
        """Add a command that `run` carries out; `text` says in one sentence what it does."""
        command: CommandParser = self._commands_action.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    def format_help(self) -> str:
        """Return usage, description, the commands with a sentence on each, and examples."""
        lines = [f"usage: {self.usage}", "", str(self.description), "", "Commands:"]
        for name, command in self.commands.items():
            text = textwrap.wrap(str(command.description), 68)
            lines += [f"  {name:<8}  {text[0]}", *(" " * 12 + line for line in text[1:])]
        lines += ["", "Examples:", *(f"  {example}" for example in self._examples), ""]
        lines += [f"`{self.prog} COMMAND --help` shows the options of a command."]
        return "\n".join([*lines, "With --json, every command prints one JSON object on stdout.", ""])

    def run_command(self, args: Sequence[str], as_json: bool) -> int:
        """Run the command that the arguments name, print its result, and return the exit code.

        Raises:
            UsageError: the command is missing or unknown, or an option is unknown.
            SystemExit: an argument is missing or wrong, or help was asked for; the text has been printed.
        """
        if not args:
            names = ", ".join(self.commands)
            raise UsageError(f"a command is missing: {names}. `{self.prog} --help` describes them.")
        if not args[0].startswith("-") and args[0] not in self.commands:
            raise UsageError(f"there is no command {f'{self.prog} {args[0]}'!r}.{did_you_mean(args[0], self.commands)}")
        options, unknown = self.parse_known_args(args)
        if unknown:
            raise UsageError(_unknown(self.commands[options.command], unknown[0]))
        value, text, code = options.run(options)
        if as_json:
            print_json(value)
        else:
            print_text(text)
        return int(code)


def _unknown(command: CommandParser, argument: str) -> str:
    """Return the message on an argument that a command does not have."""
    if not argument.startswith("-"):
        return f"`{command.prog}` takes no argument {argument!r} here; `{command.prog} --help` shows its arguments."
    flag = argument.partition("=")[0]
    flags = [spelling for spelling in command._option_string_actions if spelling.startswith("--")]
    return f"`{command.prog}` has no option {flag!r}.{did_you_mean(flag, flags)}"
