"""MNLI: does a sentence of any genre imply, contradict, or leave open another? Multi-Genre NLI, as in GLUE.

392,702 training and 9,815 matched validation rows. Malladi et al. (2023) define the masked form and report on at
most 1,000 validation rows; the causal form is this project's, CB's.
Source: Williams et al., 2018, "A broad-coverage challenge corpus for sentence understanding through inference";
mostly the Open American National Corpus (free), its fiction under several licences.
"""

from zotune.llm.tasks.entailment import fill_in, pair, suppose, unaligned
from zotune.llm.tasks.task import Task

_LABELS = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}

MNLI = Task(
    name="mnli",
    description="entailment over genres, three labels",
    causal=suppose(_LABELS),
    masked=fill_in(_LABELS),
    plain=unaligned(_LABELS),
    head=pair(_LABELS),
    labels=tuple(_LABELS),
    hub=("nyu-mll/glue", "mnli"),
    hub_test_split="validation_matched",
    source="GLUE MNLI (Williams et al., 2018), matched validation rows",
    licence="OANC (free); fiction under several licences",
    size=(392_702, 9_815),
    note="Drawn from 9,999 of the public training rows.",
)
