"""The answers of a model to prompts, in batches of prompts of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from zotune.errors import UsageError
from zotune.llm.config.run import EvalConfig
from zotune.llm.data.examples import Splits
from zotune.llm.data.tokenization import Encoded
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.rows.sources import Rows, UserRows
from zotune.llm.scoring.accuracy import batches_by_length
from zotune.llm.scoring.generation import Sampling, generate
from zotune.llm.scoring.rewards import open_ended
from zotune.llm.scoring.streaming import Stream
from zotune.llm.tasks.load_data import encode_rows, with_chat_template
from zotune.llm.tasks.user_data import load_user_data
from zotune.messages import say
from zotune.noise import derive_seed

# Rows whose text is generated are those of a reward function; this one is not called.
REWARD = "a:reward"


def encode_prompts(lm: LanguageModel, rows: Rows, config: EvalConfig) -> tuple[Encoded, ...]:
    """Return the prompts of rows as tokens.

    Args:
        lm: the model.
        rows: the rows.
        config: the options that say how a row becomes a prompt, with `REWARD` as objective.

    Raises:
        UsageError: a row does not suit the model or the options; the message says which and why.
    """
    if config.long_rows == "drop":
        raise UsageError("long_rows: drop would leave prompts without a text; give truncate or error.")
    config = with_chat_template(lm, config)
    data = load_user_data(config, lm.tokenizer, masked=lm.masked, given=UserRows(eval=rows))
    prompts = tuple(map(open_ended, data.splits.test))
    encoded = encode_rows(lm, config, replace(data, splits=Splits((), (), prompts)))
    for note in encoded.notes[len(data.notes) :]:
        say(note)
    return encoded.test


def answers(
    lm: LanguageModel,
    prompts: Sequence[Encoded],
    config: EvalConfig,
    seed: int,
    stream: Stream | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Return the text that follows each prompt, without white space around it.

    Args:
        lm: the model.
        prompts: the prompts.
        config: the options of generation and the batch size.
        seed: seed of sampling; a text depends on it and on its prompt's place in the sequence alone.
        stream: where the text of a single prompt goes while it is generated.
        progress: called with the number of prompts that have their text.

    Raises:
        NonFiniteScoreError: the logits after a prompt are not finite.
    """
    texts, done = [""] * len(prompts), 0
    for indices in batches_by_length(prompts, config.per_device_eval_batch_size):
        seeds = tuple(derive_seed(seed, i) for i in indices)
        some = generate(
            lm,
            [prompts[i].prompt for i in indices],
            config.max_new_tokens,
            stops_at_newline=config.stop_at == "newline",
            sampling=Sampling(config.temperature, config.top_p, seeds) if config.generation == "sample" else None,
            places=[prompts[i].place for i in indices],
            stream=stream,
        )
        for i, text in zip(indices, some, strict=True):
            texts[i] = text
        done += len(indices)
        progress(done)
    return texts
