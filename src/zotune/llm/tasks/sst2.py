"""SST-2: is a phrase of a film review positive or negative? Stanford Sentiment Treebank, as in GLUE.

67,349 training and 872 validation rows; the paper trains on 1,000, holds out 500 and reports on the
872 (section 4.1). Prompt and words are those of the paper's Table 1 and of Malladi et al. (2023).
Source: Socher et al., 2013; GLUE's card states no explicit licence.
"""

from __future__ import annotations

from zotune.llm.data import Example, Row, Task

_WORDS = (" terrible", " great")


def to_example(row: Row, masked: bool) -> Example:
    """`{sentence} It was` → ` terrible` or ` great`; a masked model reads `{sentence} It was<mask>.`

    >>> to_example({"sentence": "a gorgeous film ", "label": 1}, masked=False)
    Example(prompt='a gorgeous film It was', candidates=(' terrible', ' great'), label=1, suffix='')
    """
    return Example(f"{row['sentence'].strip()} It was", _WORDS, int(row["label"]), "." if masked else "")


SST2 = Task(
    name="sst2",
    description="sentiment of film reviews, two labels",
    to_example=to_example,
    hub=("nyu-mll/glue", "sst2"),
    licence="none stated (Stanford Sentiment Treebank)",
)
