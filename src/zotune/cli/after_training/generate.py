"""`zotune generate`: let a model answer prompts from the command line, a file or standard input."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zotune.cli.help import HelpPage, help_text
from zotune.cli.options import complete, is_help, parse
from zotune.cli.output import print_json, print_text
from zotune.errors import UsageError
from zotune.llm.config.generate import GenerateConfig
from zotune.llm.output.new_file import check_new_file
from zotune.messages import one_line, say
from zotune.system.atomic_write import atomic_write

_PAGE = HelpPage(
    usage="zotune generate [--OPTION VALUE ...]",
    description="Let a model answer prompts: a built-in one, one of the Hub, or a run's folder, which is asked as it "
    "was in its training. Answers go to standard output.",
    examples=(
        'zotune generate --model runs/latest --prompt "Where is my order?"',
        "zotune generate --model runs/latest --prompt-file q.jsonl --output-file a.jsonl",
        'echo "Tell me a joke." | zotune generate --temperature 0.7 --seed 1',
    ),
    groups={
        **dict.fromkeys(("prompt", "prompt_file", "prompt_format", "system_prompt", "template"), "Data"),
        **dict.fromkeys(("max_new_tokens", "temperature", "top_p", "generation", "seed"), "Run"),
    },
)
# The name of lm-eval and others for what has three values here.
_FORMATS = {"--apply-chat-template": "chat", "--no-apply-chat-template": "plain"}
_NO_PROMPT = """there is no prompt: give --prompt TEXT or --prompt-file FILE, or pipe a prompt into the command.
  zotune generate --model runs/latest --prompt "Where is my order?"
`zotune generate --help` shows the options; for a chat use `zotune chat`."""


def run(args: list[str], as_json: bool) -> int:
    """Generate and return the exit code."""
    if is_help(args):
        print_text(help_text(_PAGE, GenerateConfig, complete(GenerateConfig, {}, "defaults")))
        return 0
    args = [new for arg in args for new in _in_our_words(arg)]
    config = parse(GenerateConfig, {}, "command line", args, "zotune generate")
    if config.output_file is not None:
        check_new_file("--output-file", config.output_file)
    stdin = _standard_input(config)
    result = _generate(config, stdin)
    if config.output_file is not None:
        _write(config.output_file, result["answers"])
    if as_json:
        print_json(result)
    elif config.output_file is None:
        print_text("\n".join(_lines(result["answers"])))
    else:
        print_text(f"{len(result['answers'])} answers in {config.output_file}")
    return 0


def _in_our_words(arg: str) -> list[str]:
    form = _FORMATS.get(arg.replace("_", "-"))
    return [arg] if form is None else ["--prompt-format", form]


def _standard_input(config: GenerateConfig) -> str | None:
    """Return the text on standard input, if the prompts are there.

    Raises:
        UsageError: nothing is piped into the command.
    """
    if config.prompt or (config.prompt_file is not None and str(config.prompt_file) != "-"):
        return None
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(_NO_PROMPT)
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError:
        raise UsageError("the text on standard input is not UTF-8.") from None
    if not text.strip():
        raise UsageError(_NO_PROMPT)
    return text


def _generate(config: GenerateConfig, stdin: str | None) -> dict[str, Any]:
    """Return the answers, with what they took."""
    from zotune.llm.inference.answers import answers, encode_prompts
    from zotune.llm.inference.prompts import prompt_rows, style_of, told_columns
    from zotune.llm.models.load import load
    from zotune.llm.output.locked_folder import tidy

    tidy(Path(config.model))
    lm = load(config)
    rows, options = prompt_rows(config, style_of(config, lm.tokenizer, config.prompt_format), stdin)
    prompts = encode_prompts(lm, rows, options)
    start, count = time.perf_counter(), len(prompts)

    def progress(done: int) -> None:
        if count > config.per_device_eval_batch_size:
            say(f"{done} of {count} answers · {time.perf_counter() - start:.0f} s")

    texts = answers(lm, prompts, options, config.seed, progress=progress)
    records = [
        {"place": row.place, **told_columns(row, options), "rendered_prompt": prompt.text, "answer": text}
        for row, prompt, text in zip(rows.rows, prompts, texts, strict=True)
    ]
    return {
        "answers": records,
        "num_forwards": lm.num_forwards,
        "seconds": time.perf_counter() - start,
        "config": config.model_dump(mode="json"),
    }


def _lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the answers as lines of text: one alone as it is, several each under its prompt."""
    if len(records) == 1:
        return [str(records[0]["answer"])]
    lines: list[str] = []
    for record in records:
        shown = one_line(_asked(record).strip())
        head = f"── {record['place']}: {shown[:60]}{'…' if len(shown) > 60 else ''}"
        lines += ["", head] if lines else [head]
        lines.append(str(record["answer"]))
    return lines


def _asked(record: Mapping[str, Any]) -> str:
    """Return what a row asks, in the user's words if they are known."""
    messages = record.get("messages")
    if isinstance(messages, list) and messages:
        return str(messages[-1].get("content", ""))
    return str(record.get("instruction") or record["rendered_prompt"])


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a prompt, in their order."""
    from zotune.llm.output.json_files import json_safe

    try:
        with atomic_write(path, replace=False) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(json_safe(dict(record)), ensure_ascii=False, allow_nan=False) + "\n")
    except FileExistsError:
        raise UsageError(f"--output-file: the file {str(path)!r} was made meanwhile, and is not replaced.") from None
