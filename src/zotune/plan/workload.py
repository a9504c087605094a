"""A workload: one training step of a model, with its tuned parameters, its method and a batch of synthetic examples.

It needs no data, so it can be predicted (`zotune plan`) and measured (`zotune.plan.process_memory`) for any model. The
texts are random token ids, as in the paper's figure 3.
"""

from __future__ import annotations

import random
from typing import Literal

from pydantic import Field

from zotune.errors import UsageError
from zotune.llm.config.step import StepOptions
from zotune.llm.data.tokenization import Candidate, Encoded
from zotune.llm.models.language_model import LanguageModel


class Workload(StepOptions):
    """One step: model, tuning, method, and a batch of examples that are all of one length."""

    length: int = Field(128, ge=1, description="Tokens of each example.")
    objective: Literal["classification", "teacher_forcing"] = Field(
        "classification",
        description="The objective: classification (compares two words behind the text) or teacher_forcing "
        "(predicts every token of the text, so it needs the logits of all tokens).",
    )

    # Both objectives have a gradient and generate no text, which other options decide in a real run.
    @property
    def is_generated(self) -> bool:
        """Whether each evaluation of the objective generates text."""
        return False


def synthetic_examples(workload: Workload, lm: LanguageModel) -> list[Encoded]:
    """The examples of one step, with random token ids drawn from the workload's seed.

    Raises:
        UsageError: the examples are longer than the model's context.
    """
    length, vocabulary = workload.length, int(lm.config.get_text_config().vocab_size)
    if length > lm.context:
        raise UsageError(f"length is {length} tokens, but {lm.name} reads at most {lm.context}. Choose a lower length.")
    draw = random.Random(workload.seed)
    count = workload.per_device_train_batch_size * workload.gradient_accumulation_steps
    return [_example(workload, lm, [draw.randrange(vocabulary) for _ in range(length + 1)]) for _ in range(count)]


def _example(workload: Workload, lm: LanguageModel, ids: list[int]) -> Encoded:
    read, last = tuple(ids[:-1]), len(ids) - 2
    if lm.classifies:
        candidates = tuple(Candidate(0, (0,), (label,)) for label in range(int(lm.config.num_labels)))
    elif workload.objective == "teacher_forcing":
        candidates = (Candidate(0, tuple(range(len(read))), tuple(ids[1:])),)
    else:
        candidates = tuple(Candidate(0, (last,), (token,)) for token in range(2))
    return Encoded((read,), candidates, label=0)
