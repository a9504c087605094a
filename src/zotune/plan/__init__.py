"""What a run would take, before it: the paper's formulas, our own prediction, what fits, and what to consider."""

from zotune.llm.footprint import Memory as Memory
from zotune.plan.predict import predict as predict
