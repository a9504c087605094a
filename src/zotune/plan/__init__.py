"""What a run would take, before it: the paper's formulas, our own prediction, what fits, and what to consider."""

from zotune.plan.memory import Memory as Memory
from zotune.plan.predict import predict as predict
