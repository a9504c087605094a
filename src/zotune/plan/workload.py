"""One step of a made-up run: a model, what of it is tuned, how, and a batch of so many examples of so many tokens.

It needs no data, and so can be predicted (`zotune plan`) and measured (`zotune.bench.measure.process_memory`) for any
model. The texts are random ids, as in the paper's figure 3.
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
        description="What is minimised: classification (two words after the text are compared) or teacher_forcing "
        "(every token of the text is predicted, so there are logits of all of them).",
    )

    # The objective has a gradient and generates no text: what a run's other options would say.
    @property
    def is_generated(self) -> bool:
        """Whether each evaluation of the objective generates text."""
        return False


def made_up(workload: Workload, lm: LanguageModel) -> list[Encoded]:
    """The examples of one step, of random ids that the seed names.

    Raises:
        UsageError: the model does not read so many tokens.
    """
    length, vocabulary = workload.length, int(lm.config.get_text_config().vocab_size)
    if length > lm.context:
        raise UsageError(f"length is {length} tokens, but {lm.name} reads at most {lm.context}.")
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
