"""Generation ends at every end token of the checkpoint, and nothing of the checkpoint's own decoding enters."""

import json

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2ForSequenceClassification

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.data.collator import collate
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoder
from zotune.llm.models.load import load
from zotune.llm.models.random_models import byte_tokenizer
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.scoring.generation import generate
from zotune.llm.tasks.load_data import load_rows
from zotune.llm.training.evaluation import evaluate

END_OF_TURN = 120


def saying(lm, *tokens):
    """Let the model say these tokens whatever it reads, one after the other, the last one for ever."""
    said = iter([*tokens[:-1], *[tokens[-1]] * 1000])
    index = {"token": None}

    def forward(module, args, output):
        index["token"] = next(said)
        best = torch.full_like(output, -10.0)
        best[..., index["token"]] = 10.0
        return best

    lm.base.get_output_embeddings().register_forward_hook(forward)


@pytest.mark.parametrize("is_list", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_generation_ends_at_every_end_token_of_the_checkpoint(tiny, tmp_path, family, is_list):
    lm = tiny(family)
    lm.module.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    ends = [lm.tokenizer.eos_token_id, END_OF_TURN] if is_list else END_OF_TURN
    GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path)
    for end in (END_OF_TURN, lm.tokenizer.eos_token_id):
        loaded = load(ModelOptions(model=str(tmp_path), device="cpu"))
        assert loaded.end_tokens == {lm.tokenizer.eos_token_id, END_OF_TURN}
        letters = lm.tokenizer("ab", add_special_tokens=False)["input_ids"]
        saying(loaded, *letters, end, 200)
        before = loaded.num_forwards
        # The end itself is no part of the text, although the tokenizer does not know it as special.
        assert generate(loaded, [(0, 70)], 12, stops_at_newline=False) == ["ab"]
        assert loaded.num_forwards - before == 3


def test_a_default_of_the_models_class_is_no_end_token(tiny):
    lm = tiny("llama")
    default = lm.config.eos_token_id
    assert lm.end_tokens == {default}
    lm.tokenizer.eos_token = "<unk>"
    assert lm.end_tokens == {default, lm.tokenizer.unk_token_id}  # it is a special token
    lm.module.config.eos_token_id = lm.module.generation_config.eos_token_id = 99
    assert lm.end_tokens == {99, lm.tokenizer.unk_token_id}


def test_a_row_that_ended_is_not_continued_by_the_padding(tiny):
    """Rows of one batch end at different lengths; the padding here is an ordinary token."""
    lm = tiny("llama")
    prompts = [lm.tokenizer(text)["input_ids"] for text in ("hello there", "a", "once upon a")]
    alone = [generate(lm, [tuple(p)], 20, stops_at_newline=False)[0] for p in prompts]
    lm.tokenizer.pad_token, first = None, {}
    for p in prompts:
        out = lm.module.generate(torch.tensor([p]), max_new_tokens=3, do_sample=False, eos_token_id=None)
        first[tuple(p)] = out[0, len(p) :].tolist()
    # An end that comes third in one row ends that row alone.
    end = first[tuple(prompts[0])][2]
    lm.module.generation_config = GenerationConfig(eos_token_id=end)
    together = generate(lm, list(map(tuple, prompts)), 20, stops_at_newline=False)
    assert together == [generate(lm, [tuple(p)], 20, stops_at_newline=False)[0] for p in prompts]
    assert all(whole.startswith(cut) for whole, cut in zip(alone, together, strict=True))
    said = first[tuple(prompts[0])]
    assert together[0] == lm.tokenizer.decode(said[: said.index(end)], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "own",
    [
        {"suppress_tokens": list(range(70, 120))},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
        {"bad_words_ids": [[90], [91]]},
        {"forced_eos_token_id": 2, "min_new_tokens": 8},
        {"num_beams": 3, "length_penalty": 2.0},
    ],
    ids=lambda own: next(iter(own)),
)
def test_no_option_of_the_checkpoints_own_decoding_enters(tiny, own):
    lm = tiny("qwen3")
    prompts = [tuple(lm.tokenizer(text)["input_ids"]) for text in ("hello", "what is it")]
    before = generate(lm, prompts, 10, stops_at_newline=False)
    lm.module.generation_config = GenerationConfig(**own)
    assert generate(lm, prompts, 10, stops_at_newline=False) == before
    assert lm.module.generation_config.to_dict()["bos_token_id"] is None  # put back


@pytest.mark.parametrize(
    "tuning",
    [
        {"tuning": "prompt", "num_virtual_tokens": 3},
        {"tuning": "prefix", "num_virtual_tokens": 2},
        {"tuning": "peft", "peft_type": "p_tuning", "peft_config": {"num_virtual_tokens": 3}},
        {
            "tuning": "peft",
            "peft_type": "cpt",
            "peft_config": {"cpt_token_ids": [70, 71], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
        },
    ],
    ids=lambda tuning: tuning.get("peft_type", tuning["tuning"]),
)
@pytest.mark.parametrize("family", ["opt", "gemma3", "mistral"])
def test_generation_after_virtual_tokens_is_a_full_pass_for_each_token(tuning, family):
    config = TrainConfig(model=f"random:{family}-tiny", task="sst2", device="cpu", **tuning)
    lm = load(config)
    prepare_tuning(lm, config)
    ids = lm.tokenizer("hello there")["input_ids"]
    said = list(ids)
    with torch.no_grad():
        for _ in range(8):
            x = torch.tensor([said])
            said.append(int(lm.read(x, torch.ones_like(x))[0, -1].argmax()))
    expected = lm.tokenizer.decode(said[len(ids) :], skip_special_tokens=True).strip()
    lm.tokenizer.eos_token = None
    lm.base.generation_config = GenerationConfig()
    assert generate(lm, [tuple(ids)], 8, stops_at_newline=False) == [expected]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_exact_match_generates_as_many_tokens_and_lines_as_asked(tiny, tmp_path):
    long = [{"prompt": f"Q{i}:", "completion": " x" * 35 + "\ny"} for i in range(2)]
    path = write(tmp_path / "rows.jsonl", long)
    with pytest.raises(UsageError, match=r"72 tokens\. Raise --max-new-tokens"):
        load_rows(tiny("llama"), DataOptions(eval_file=path, exact_match=True))
    options = {"eval_file": path, "exact_match": True, "max_new_tokens": 80, "stop_at": "end"}
    found, _ = evaluate(EvalConfig(model="random:llama-tiny", device="cpu", **options))
    lm = load(ModelOptions(model="random:llama-tiny", device="cpu"))
    prompts = [tuple(lm.tokenizer(row["prompt"])["input_ids"]) for row in long]
    expected = tuple(generate(lm, [p], 80, stops_at_newline=False)[0] for p in prompts)
    assert found["rows"].evaluation.predictions == expected
    with pytest.raises(ValueError, match=r"max_new_tokens has no effect here: it needs .*--exact-match"):
        DataOptions(eval_file=path, max_new_tokens=80)


def test_a_classifier_without_padding_token_reads_each_row_as_if_alone():
    """transformers' own result for each row alone, where the last token is the last one."""
    torch.manual_seed(0)
    module = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=2, num_labels=3)
    ).eval()
    tokenizer = byte_tokenizer(module.config)
    tokenizer.pad_token = None
    from zotune.llm.models.language_model import LanguageModel

    lm = LanguageModel(module, tokenizer, "gpt2", masked=True, classifies=True)
    encode = Encoder(tokenizer, masked=True, context=64, max_length=None, classifies=True)
    texts = ("a", "a longer text", "middling")
    examples = [encode(Example(text, ("x", "y", "z"), 0)) for text in texts]
    with torch.no_grad():
        together = lm.logits(collate(examples, lm.pad_token_id, lm.device))
        module.config.pad_token_id = None
        alone = torch.cat([module(torch.tensor([tokenizer(text)["input_ids"]])).logits for text in texts])
    torch.testing.assert_close(together, alone)


def test_padding_has_an_embedding(tiny):
    lm = tiny("llama")
    lm.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    more = lm.num_embeddings - len(lm.tokenizer) + 1
    lm.tokenizer.add_tokens([f"<{i}>" for i in range(more)])
    lm.tokenizer.add_special_tokens({"pad_token": f"<{more - 1}>"})
    assert lm.tokenizer.pad_token_id >= lm.num_embeddings > lm.pad_token_id
