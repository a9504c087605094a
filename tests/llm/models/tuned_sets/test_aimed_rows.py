"""An aim is found from the rows as the run scores them: of a single answer all tokens count, and their normalisers."""

from dataclasses import replace

import pytest
import torch

import zotune as zo
from tuning_schemes import EXAMPLES, prepared
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.collator import collate
from zotune.llm.data.tokenization import Encoder
from zotune.llm.models.tuned_sets.find import find_aim, set_aim
from zotune.llm.scoring.objectives import TEACHER_FORCING

RANK = 6


def aimed_at(lm, rows):
    """The directions found for the gain of the last norm, (width, RANK)."""
    options = {"tuning": "norms", "tuned_layers": 0, "activation_rank": RANK}
    set_aim(prepared(lm, **options), find_aim(lm, TrainConfig.model_validate({"task": "sst2", **options}), rows))
    (tensor,) = zo.ParameterSet(lm.module)
    return lm.aim.subspaces[tensor.name].left.double()


def normalised_rows(lm, batch):
    """What the gain of the last norm multiplies, (rows, width), at the scored positions."""
    seen = []
    hook = lm.base.model.norm.register_forward_hook(lambda module, args, output: seen.append(output / module.weight))
    with torch.no_grad():
        lm.score(batch)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])[batch.positions].double()


def scored_at(row, positions):
    """A row of one sequence, scored at some positions only."""
    first = row.candidates[0]
    return replace(row, candidates=(replace(first, positions=positions, tokens=first.tokens[: len(positions)]),))


@pytest.mark.parametrize("kind", ["answers", "prompts"])
def test_components_of_the_last_norm_are_those_of_all_scored_tokens_where_nothing_is_chosen(tiny, kind):
    lm = tiny("llama")
    encode = Encoder(lm.tokenizer, masked=False, context=lm.context, max_length=None)
    read = [TEACHER_FORCING.reads(encode(replace(e, candidates=(" not a single token",), label=0))) for e in EXAMPLES]
    rows = read
    if kind == "prompts":  # of these the last position is read
        rows = [encode(replace(e, candidates=(), label=0)) for e in EXAMPLES]
        read = [scored_at(answered, (len(row.prompt) - 1,)) for answered, row in zip(read, rows, strict=True)]
    q = aimed_at(lm, rows)
    x = normalised_rows(lm, collate(read, lm.pad_token_id, lm.device, exact=True))
    best = float(torch.linalg.svdvals(x)[:RANK].square().sum())
    assert float((x @ q).square().sum()) > 0.999 * best
