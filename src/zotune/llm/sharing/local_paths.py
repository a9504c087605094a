"""Text and values that name no place on this machine: of paths only the last part remains.

What goes to other machines goes through here, and is searched once more for this machine's folders at the end.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

from zotune.errors import UsageError
from zotune.llm.checkpoints.hub_names import hub_id
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.llm.data.readers import HUB

# No number of a result depends on this module.
COUNTS_FOR_RESULTS = "never"

# An absolute path within a text, and not the end of a word, of an address or of a tag.
_ABSOLUTE = re.compile(r"(?<![\w.:/<}])(?:/[\w.@+~=,-]+)+")
# A text that is a path and nothing else.
_LOOKS_LIKE_PATH = re.compile(r"(?:~|\.\.?)?/[^\s{}]+")
# Keys that name a model, which is a folder of this machine or has a name on the Hub.
_MODELS = frozenset({"model", "base_model_name_or_path", "tokenizer_name_or_path", "name_or_path"})
# Keys of what a model reads and writes, at any depth: with another text it would be asked another question.
_TEXTS = frozenset(
    {"template", "system_prompt", "verbalizer", "columns", "text_column", "label_column", "delimiter"}
    | {"id2label", "label2id", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"}
    | {"model_specific_special_tokens", "content", "stop_strings", "response_schema"}
)
_CHAT_TEMPLATE = "chat_template"


@cache
def _path_options() -> frozenset[str]:
    """Return the names of the options that hold paths of files and folders."""

    def holds_path(annotation: Any) -> bool:
        return annotation is Path or any(map(holds_path, get_args(annotation)))

    fields = {**TrainConfig.model_fields, **EvalConfig.model_fields}
    return frozenset({"data_source"}) | frozenset(name for name, info in fields.items() if holds_path(info.annotation))


def without_paths(value: Any, key: str = "") -> Any:
    """Return a value of JSON or YAML, at any depth, in which each local path is its last part.

    What a model reads, such as a template or the text of a token, stays as it is.

    Args:
        value: the value.
        key: the key that it stands under.

    >>> without_paths({"train_file": "/home/me/data/rows.jsonl", "model": "facebook/opt-125m", "seed": 1})
    {'train_file': 'rows.jsonl', 'model': 'facebook/opt-125m', 'seed': 1}
    """
    if _is_text_of_model(value, key):
        return value
    if isinstance(value, Mapping):
        return {str(without_paths(k)): without_paths(part, str(k)) for k, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(part, key) for part in value]
    return _without_paths(value, key) if isinstance(value, str) else value


def _without_paths(value: str, key: str) -> str:
    if key in _MODELS:
        return value if value.startswith("random:") or hub_id(value) == value else _last_part(value)
    if key in _path_options() or key == _CHAT_TEMPLATE:
        return value if value.startswith(HUB) else _last_part(value)
    return text_without_paths(_last_part(value) if _is_there(value) else value)


def _is_text_of_model(value: Any, key: str) -> bool:
    """Whether a value is what a model reads or writes; a chat template may be the path of a file instead."""
    if key == _CHAT_TEMPLATE:
        is_path = isinstance(value, str) and (_LOOKS_LIKE_PATH.fullmatch(value) or _is_there(value))
        return not (is_path or isinstance(value, list | tuple))
    return key in _TEXTS or key.endswith("_token")


def _last_part(path: str) -> str:
    """Return the last part of a path; that of the home folder would be the user's name."""
    return "~" if Path(path) in _homes() else Path(path).name


def _homes() -> list[Path]:
    """Return the home folder as it is named, and where it is; none if it is the root of all."""
    return [home for home in (Path.home(), Path.home().resolve()) if home.name]


def _is_there(value: str) -> bool:
    """Whether a text is the path of something on this machine, written so that it cannot be anything else."""
    if "/" not in value or "\n" in value or len(value) > 4096 or value.startswith(HUB):
        return False
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def text_without_paths(text: str) -> str:
    """Return a text in which each path below a folder at the root of this machine is its last part.

    >>> text_without_paths("read from /tmp/a/rows.jsonl at https://example.org/a/b; answer /no_think")
    'read from rows.jsonl at https://example.org/a/b; answer /no_think'
    """
    if "/" not in text and Path.home().is_absolute():  # as most lines of metrics.jsonl
        return text
    for home in _homes():  # first, as a comma behind it would count as a part of it
        text = re.sub(rf"(?<![\w./]){_named(str(home))}(?!/)", "~", text)
    for root in roots():
        if not _ABSOLUTE.fullmatch(root):
            text = re.sub(rf"{re.escape(root)}/(?:[\w.@+~=,-]+/)*", "", text)
    text = _ABSOLUTE.sub(lambda found: _last_part(found[0]) if _begins_here(found[0]) else found[0], text)
    for root in roots():  # what is left of other paths with spaces
        text = re.sub(_named(root), _last_part(root), text.replace(f"{root}/", ""))
    return text


def _named(root: str) -> str:
    """Return the pattern of a folder's name in a text, which is not the beginning of a longer name."""
    return rf"{re.escape(root)}(?![\w-]|\.\w)"


@cache
def _begins_here_at(first: str) -> bool:
    return Path("/", first).is_dir()


def _begins_here(path: str) -> bool:
    return path.count("/") > 1 and _begins_here_at(path.split("/")[1])


def roots(*more: Path) -> list[str]:
    """Return the folders of this machine that no shared file may name: home, the current one, that of scratch files."""
    found = {str(path) for path in (Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *more)}
    found |= {str(Path(path).resolve()) for path in found}
    return sorted((path for path in found if path.count("/") > 0 and len(path) > 1), key=len, reverse=True)


def check_no_path(contents: Iterable[tuple[str, bytes]], *folders: Path) -> None:
    """Check that no content names a folder of this machine.

    Args:
        contents: names of files with their content.
        folders: further folders that are of this machine.

    Raises:
        UsageError: one does; the message names the file.
    """
    named = roots(*folders)
    for name, content in contents:
        found = next(_found(content, named), None)
        if found is not None:
            raise UsageError(
                f"{name} names the folder {found!r} of this machine, which others should not see, so nothing is "
                "uploaded. Take it out of the file, or move the file away."
            )


def _found(content: bytes, named: list[str]) -> Iterator[str]:
    # JSON may escape the slashes, and every character that is not ASCII.
    plain = content.replace(b"\\/", b"/").decode("utf-8", "replace")
    spelt = ((root, {root, ascii(root)[1:-1]}) for root in named)
    return (root for root, spellings in spelt if any(re.search(_named(one), plain) for one in spellings))
