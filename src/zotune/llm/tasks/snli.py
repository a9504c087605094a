"""SNLI: does a caption imply, contradict, or leave open a sentence? Stanford Natural Language Inference.

549,367 training and 9,842 validation rows with a gold label (those without are left out). Malladi et al. (2023)
define the masked form and report on at most 1,000 validation rows; the causal form is this project's, CB's.
Source: Bowman et al., 2015, "A large annotated corpus for learning natural language inference"; CC BY-SA 4.0.
"""

from zotune.llm.tasks.entailment import fill_in, pair, suppose, unaligned
from zotune.llm.tasks.task import Task

_LABELS = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}

SNLI = Task(
    name="snli",
    description="entailment between captions, three labels",
    causal=suppose(_LABELS),
    masked=fill_in(_LABELS),
    plain=unaligned(_LABELS),
    head=pair(_LABELS),
    labels=tuple(_LABELS),
    hub=("stanfordnlp/snli", None),
    source="SNLI (Bowman et al., 2015)",
    licence="CC BY-SA 4.0",
    size=(549_367, 9_842),
    note="Drawn from 9,999 of the public training rows.",
)
