"""A text that is handed on while it is generated is the text that is generated, and stops when it is told to."""

import pytest

from zotune.llm.config.run import TrainConfig
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.scoring.generation import Sampling, generate
from zotune.llm.scoring.streaming import Stream

PROMPT = (0, 70, 80, 90, 100)


@pytest.fixture
def tuned(tiny):
    """A function: a tiny model with what a scheme puts around it; its text varies."""

    def make(family, scheme):
        lm = tiny(family)
        if scheme is not None:
            options = {"task": "sst2", "tuning": scheme, "model": f"random:{family}-tiny"}
            prepare_tuning(lm, TrainConfig.model_validate(options))
        return lm

    return make


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
@pytest.mark.parametrize("scheme", [None, "lora", "prefix", "prompt"])
def test_the_pieces_are_the_text(tuned, family, scheme):
    lm, pieces = tuned(family, scheme), []
    options = {"stops_at_newline": False, "sampling": Sampling(1.0, 1.0, (0,))}
    (whole,) = generate(lm, [PROMPT], 12, **options)
    (streamed,) = generate(lm, [PROMPT], 12, **options, stream=Stream(pieces.append))
    assert streamed == whole == "".join(pieces).strip()
    assert pieces[0] == pieces[0].lstrip()


def test_an_end_token_is_no_piece_of_the_text(tiny):
    """The end of a turn need be no special token of the tokenizer, so a streamer of transformers would print it."""
    lm = tiny("llama")
    letters = lm.tokenizer("ab", add_special_tokens=False)["input_ids"]
    lm.base.generation_config.eos_token_id = 120
    lm.base.generation_config._from_model_config = False
    said = iter([*letters, 120, 200])

    def forward(module, args, output):
        output.fill_(-10.0)
        output[..., next(said)] = 10.0

    lm.base.get_output_embeddings().register_forward_hook(forward)
    pieces = []
    assert generate(lm, [PROMPT], 9, stops_at_newline=False, stream=Stream(pieces.append)) == ["ab"]
    assert pieces == ["a", "b"]  # each when it is there


def test_a_text_that_is_stopped_ends_with_the_token_in_progress(tiny):
    lm, pieces = tiny("llama"), []
    (whole,) = generate(lm, [PROMPT], 24, stops_at_newline=False)
    before, asked = lm.num_forwards, iter([False, False, True])
    (part,) = generate(lm, [PROMPT], 24, stops_at_newline=False, stream=Stream(pieces.append, lambda: next(asked)))
    assert part == "".join(pieces).strip()
    assert whole.startswith(part)
    assert lm.num_forwards - before == 3


def test_a_stream_takes_one_prompt(tiny):
    with pytest.raises(ValueError, match="one prompt, not of 2"):
        generate(tiny("llama"), [PROMPT, PROMPT], stream=Stream(print))
