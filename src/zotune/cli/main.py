"""The `zotune` command: choose the verb, run it, and turn errors into one message and an exit code.

Results go to stdout, everything else to stderr. Exit codes: 0 done · 1 the run failed · 2 wrong usage or config ·
130/143 interrupted, with the results so far saved · 141 the reader of stdout left.
Each verb imports its heavy libraries when it runs, so that help comes at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from io import TextIOWrapper

from zotune.cli.output import OutputClosedError, print_message, print_text
from zotune.errors import UsageError, ZotuneError, did_you_mean, is_out_of_memory
from zotune.messages import Lossy
from zotune.system.loggers import quiet_loggers

_HELP = """usage: zotune COMMAND [--OPTION VALUE ...]

Fine-tune language models with forward passes only, at the memory of inference.

Commands:
  train      Fine-tune a model on a task or on your own rows.
  eval       Measure a model's accuracy, F1 or loss, with 95 % intervals.
  generate   Let a model answer prompts.
  chat       Chat with a model in the terminal.
  merge      Make one whole model of an adapter and its base model.
  export     Write a model as a GGUF file, for llama.cpp and Ollama.
  push       Upload a model to the Hugging Face Hub.
  plan       Predict memory (and time) of each method before a run.
  tune       Search learning rate and other options on held-out rows.
  ledger     Show, verify, replay, undo, export or merge fine-tunes.
  bench      Run the experiments of the benchmark and report the results.
  models     List the models that have a name here.
  tasks      List the tasks that have a name here.
  methods    List the methods.
  schema     Print the JSON Schema of recipes, for editors.
  env        Show versions, processor, GPU and cache folder.

Examples:
  zotune train sst2-smollm2
  zotune train --train-file my.jsonl --dry-run
  zotune eval --model runs/latest --task sst2
  zotune chat --model runs/latest

`zotune COMMAND --help` shows the options of a command. With --json, every
command prints one JSON object on stdout. `zotune --version` shows the version.
"""

# The module and the function that run a verb, given its arguments without --json and whether --json was among them.
_VERBS = {
    "train": ("train", "run"),
    "eval": ("eval", "run"),
    "generate": ("after_training.generate", "run"),
    "chat": ("after_training.chat", "run"),
    "merge": ("after_training.merge", "run"),
    "export": ("after_training.export", "run"),
    "push": ("after_training.push", "run"),
    "plan": ("plan", "run"),
    "tune": ("tune", "run"),
    "ledger": ("ledger", "run"),
    "bench": ("bench", "run"),
    "models": ("listings", "models"),
    "tasks": ("listings", "tasks"),
    "methods": ("listings", "methods"),
    "schema": ("schema", "run"),
    "env": ("listings", "env"),
}
# The verbs whose work several processes share.
_SHARED_VERBS = ("train", "eval")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    keep_standard_streams()
    if (
        argv is None
        and sys.argv[1:2] in (["train"], ["tune"], ["eval"])
        and not {"-h", "--help", "--dry-run"} & {*sys.argv}
    ):
        from zotune.system.malloc import restart_with_heap_environment

        restart_with_heap_environment()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that cannot show a character gets its escape
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def keep_standard_streams() -> None:
    """Let a full or closed stderr end nothing, and give no file the number of a closed standard stream.

    Libraries write messages to number 2 whatever it is; were it free, the ledger could get it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # From here on, for the interpreter flushes the stream at its end, and would change the exit code.
    sys.stderr = Lossy(sys.stderr)


def run(argv: list[str]) -> int:
    """Run a command and return its exit code."""
    # Threads of torch wait for work by spinning for about 50 µs instead of milliseconds: this is as fast on an idle
    # processor, and does not stall a busy one. GNU's OpenMP reads the variable when it loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    quiet_loggers()
    try:
        return _dispatch(argv)
    except OutputClosedError:
        return 141
    except (Exception, KeyboardInterrupt) as error:
        message, code = _explain(error)
        if (shown := _of_process(error, message)) is not None:
            print_message(shown)
        return code


def _of_process(error: BaseException, message: str) -> str | None:
    """Return a message as this process, one of several that torchrun started, prints it; None: another one does."""
    if "RANK" not in os.environ:
        return message
    from zotune.system.processes import is_first_process, rank_of

    if (rank := rank_of(error)) is not None:
        return f"process {rank}: {message}" if is_first_process() else None
    # What is wrong with the command is so in all processes of a machine.
    is_silent = isinstance(error, UsageError) and os.environ.get("LOCAL_RANK", "0") != "0"
    return None if is_silent and not getattr(error, "is_told", False) else message


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print_text(_HELP.rstrip())
        return 0
    verb, *arguments = argv
    if verb == "--version":
        import zotune

        print_text(f"zotune {zotune.__version__}")
        return 0
    if verb not in _VERBS:
        raise UsageError(f"there is no command {verb!r}.{did_you_mean(verb, _VERBS)}")
    if verb not in _SHARED_VERBS and os.environ.get("WORLD_SIZE", "1") != "1" and not {"-h", "--help"} & {*arguments}:
        raise UsageError(
            f"zotune {verb} runs in one process, and torchrun started {os.environ['WORLD_SIZE']}: run it without "
            f"torchrun. Several processes share zotune {' and zotune '.join(_SHARED_VERBS)}."
        )
    module, function = _VERBS[verb]
    command: Callable[[list[str], bool], int] = getattr(import_module(f"zotune.cli.{module}"), function)
    return command([a for a in arguments if a != "--json"], "--json" in arguments)


def _explain(error: BaseException) -> tuple[str, int]:
    """Return the message that explains an error, and the exit code of its kind."""
    if isinstance(error, ZotuneError):
        return str(error), 2 if isinstance(error, UsageError) else 1
    if isinstance(error, ImportError):
        return f"{error}. The command line needs the packages of its extra: pip install 'zotune[llm]'", 1
    if is_out_of_memory(error):
        return "out of memory. Try a smaller batch (--per-device-train-batch-size), bfloat16, or a smaller model.", 1
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted", 130
    if isinstance(error, OSError):
        path = getattr(error, "filename", None)
        return f"{error.strerror or error}{f': {path}' if path else ''}", 1
    # Nobody foresaw it, so the way to it is all that there is to say.
    trace = "".join(traceback.format_exception(error))
    return f"an unforeseen error, which may be a bug of zotune; please report it with these lines.\n{trace.rstrip()}", 1


if __name__ == "__main__":
    main()
