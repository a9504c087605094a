"""What zotune makes of another tool's option, as a cell of a Markdown table; needs no Sphinx."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zotune.llm.config.aliases import alias_table
from zotune.llm.config.run import TrainConfig

# What the converters of aliases.py make of a name.
_CONVERTED = {
    "train_data": "`train_file`, or `hub:ORG/NAME`",
    "eval_data": "`eval_file`, or `hub:ORG/NAME`",
    "one_dataset": "`train_file`; one data set of chats is read, others are answered",
    "one_test_dataset": "`eval_file`; one data set of chats is read, others are answered",
    "rows_held_out": "`num_dev`, a number of rows",
    "target_modules": "`lora_target_modules`",
    "task": "`task`",
}


def options_text(options: Mapping[str, Any]) -> str:
    """Our options as a recipe has them.

    >>> options_text({"dtype": "bfloat16"}), options_text({})
    ('`dtype: bfloat16`', 'as here')
    """
    values = {k: f"[{', '.join(v)}]" if isinstance(v, list) else v for k, v in options.items()}
    return ", ".join(f"`{name}: {value}`" for name, value in values.items()) or "as here"


def meaning_text(name: str) -> str:
    """What becomes of a name, as a cell of Markdown: our option, our values for its values, or the answer.

    >>> meaning_text("lr"), meaning_text("max_steps"), meaning_text("do_train")
    ('`learning_rate`', 'the same; `-1`: as here', '`true`: as here; `false`: `zotune eval` evaluates without training')
    """
    table = alias_table()
    if name in table.same:
        target = table.same[name]
        return f"`{target}`" if target in TrainConfig.model_fields else meaning_text(target)
    if name in TrainConfig.model_fields:
        row = table.values_of_ours.get(name, {})
        return "; ".join(["the same", *(f"`{value}`: {options_text(to)}" for value, to in row.items())])
    if name in table.converted:
        return _CONVERTED[table.converted[name]]
    if name in table.ignored:
        return "left out; it cannot change a result here"
    if name in table.answers:
        return table.answers[name]
    row = table.values[name]
    cells = [(v, m if isinstance(m, str) else options_text(m)) for v, m in row.items()]
    return "; ".join(f"{'others' if value == '*' else f'`{value}`'}: {text}" for value, text in cells)
