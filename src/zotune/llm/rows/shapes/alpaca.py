"""An instruction, an input that it may have, and the output, as Alpaca's (Taori et al., 2023).

A model with a chat template reads the instruction and the input as the user's turn, and the output is the assistant's.
Other models read the prompt that Alpaca was trained with, and that other tools write for such rows.
"""

from __future__ import annotations

from zotune.llm.config.data import DataOptions
from zotune.llm.data.readers.located import LocatedRow
from zotune.llm.rows.cells import column_of, not_empty, optional_text
from zotune.llm.rows.records import Completion
from zotune.llm.rows.shape import Shape
from zotune.llm.rows.templates import fill, prompt_of

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompts of Alpaca, for rows with and without an input."""


def to_record(row: LocatedRow, options: DataOptions) -> Completion:
    """Return the prompt and the output; a template of the user takes the place of Alpaca's and of the chat template."""
    names = {role: column_of(role, options) for role in ("instruction", "input", "output", "system")}
    output = not_empty(row, names["output"])
    if options.template is not None:
        # A row without an input has an empty one.
        told = LocatedRow(row.place, {**row.columns, names["input"]: optional_text(row, names["input"])})
        return Completion(place=row.place, columns=row.columns, prompt=prompt_of(told, options), completion=output)
    values = {"instruction": not_empty(row, names["instruction"]), "input": optional_text(row, names["input"])}
    has_input = bool(values["input"].strip())
    return Completion(
        place=row.place,
        columns=row.columns,
        prompt=fill(WITH_INPUT if has_input else WITHOUT_INPUT, values, options),
        completion=output,
        user="\n".join(values.values()) if has_input else values["instruction"],
        system=optional_text(row, names["system"]) or None,
    )


ALPACA = Shape(
    "an instruction and its output, as Alpaca's",
    None,
    ("instruction", "output"),
    to_record,
    frozenset({"template", "exact_match", "chat_date"}),
    ("input", "system"),
)
