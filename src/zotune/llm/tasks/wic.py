"""WiC: does a word mean the same in two sentences? Word in Context, as in SuperGLUE.

5,428 training and 638 validation rows; Malladi et al. (2023) train on 1,000, hold out 500 and report on the 638.
The prompt is theirs; they define no masked form.
Source: Pilehvar and Camacho-Collados, 2019, "WiC: the word-in-context dataset"; CC BY-NC 4.0.
"""

from __future__ import annotations

from zotune.llm.data.examples import Example, Row
from zotune.llm.tasks.task import HEAD_TAKES_TWO_TEXTS, MASKED_IS_NOT_DEFINED, Task

_WORDS = ("No", "Yes")


def causal(row: Row) -> Example:
    r"""`Does the word "{word}" have the same meaning in these two sentences? Yes, No?⏎{s1}⏎{s2}⏎` → `No` | `Yes`.

    >>> causal({"word": "way", "sentence1": "Come this way.", "sentence2": "No way.", "label": 0}).prompt
    'Does the word "way" have the same meaning in these two sentences? Yes, No?\nCome this way.\nNo way.\n'
    """
    question = f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No?'
    return Example(f"{question}\n{row['sentence1']}\n{row['sentence2']}\n", _WORDS, int(row["label"]))


def plain(row: Row) -> Example:
    """`"{word}"⏎{s1}⏎{s2}⏎` → the same words."""
    return Example(f'"{row["word"]}"\n{row["sentence1"]}\n{row["sentence2"]}\n', _WORDS, int(row["label"]))


WIC = Task(
    name="wic",
    description="whether a word means the same in two sentences",
    causal=causal,
    masked=MASKED_IS_NOT_DEFINED,
    plain=plain,
    head=HEAD_TAKES_TWO_TEXTS,
    hub=("aps/super_glue", "wic"),
    source="SuperGLUE WiC (Pilehvar and Camacho-Collados, 2019)",
    licence="CC BY-NC 4.0",
    size=(5_428, 638),
)
