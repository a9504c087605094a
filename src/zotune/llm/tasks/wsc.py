"""WSC: does a pronoun refer to a noun? Winograd Schema Challenge, as in SuperGLUE.

554 training and 104 validation rows; the scripts of Malladi et al. (2023) hold out 500, which leaves 54 to train on,
and report on the 104. The prompt is theirs; they define no masked form.
Source: Levesque et al., 2012; as SuperGLUE's card states: research use.
"""

from __future__ import annotations

from zotune.llm.data.examples import Example, Row
from zotune.llm.tasks.task import HEAD_TAKES_TWO_TEXTS, MASKED_IS_NOT_DEFINED, Task

_WORDS = ("No", "Yes")


def causal(row: Row) -> Example:
    r"""`{text}⏎In the previous sentence, does the pronoun "{span2, lower-cased}" refer to {span1}? Yes or No?⏎` → `No`
    | `Yes`.

    >>> row = {"text": "Mark left. He ran.", "span1_text": "Mark", "span2_text": "He", "label": 1}
    >>> causal(row).prompt
    'Mark left. He ran.\nIn the previous sentence, does the pronoun "he" refer to Mark? Yes or No?\n'
    """
    pronoun, noun = row["span2_text"].lower(), row["span1_text"]
    question = f'In the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?'
    return Example(f"{row['text']}\n{question}\n", _WORDS, int(row["label"]))


def plain(row: Row) -> Example:
    """`{text}⏎"{span2, lower-cased}"⏎{span1}⏎` → the same words."""
    return Example(f'{row["text"]}\n"{row["span2_text"].lower()}"\n{row["span1_text"]}\n', _WORDS, int(row["label"]))


WSC = Task(
    name="wsc",
    description="whether a pronoun refers to a noun",
    causal=causal,
    masked=MASKED_IS_NOT_DEFINED,
    plain=plain,
    head=HEAD_TAKES_TWO_TEXTS,
    hub=("aps/super_glue", "wsc.fixed"),
    source="SuperGLUE WSC (Levesque et al., 2012)",
    licence="research use (SuperGLUE)",
    size=(554, 104),
    num_train=54,
)
