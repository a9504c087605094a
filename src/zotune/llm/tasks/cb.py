"""CB: does a writer commit to what a clause says? CommitmentBank, as in SuperGLUE.

250 training and 56 validation rows; Malladi et al. (2023) train on 150, hold out 100 and report on the 56.
The prompt is theirs; they define no masked form.
Source: de Marneffe et al., 2019; as SuperGLUE's card states: research use.
"""

from zotune.llm.tasks.entailment import pair, suppose, unaligned
from zotune.llm.tasks.task import MASKED_IS_NOT_DEFINED, Task

_LABELS = {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"}

CB = Task(
    name="cb",
    description="what a writer commits to, three labels",
    causal=suppose(_LABELS),
    masked=MASKED_IS_NOT_DEFINED,
    plain=unaligned(_LABELS),
    head=pair(_LABELS),
    labels=tuple(_LABELS),
    hub=("aps/super_glue", "cb"),
    source="SuperGLUE CB (de Marneffe et al., 2019)",
    licence="research use (SuperGLUE)",
    size=(250, 56),
    num_train=150,
    num_dev=100,
)
