"""Plain text is learnt token by token as transformers counts its loss, alone or packed; long rows are as asked."""

import gzip
import json
import math

import pytest
import torch

from zotune.errors import UsageError
from zotune.llm import train
from zotune.llm.config.data import DataOptions
from zotune.llm.rows.sources import read_files
from zotune.llm.tasks.load_data import load_rows
from zotune.llm.tasks.user_data import load_user_data

TEXTS = ("Once upon a time.", "é 👋", "The end, which is a longer text than the others</s>")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture(params=[True, False], ids=["bos", "no-bos"])
def lm(request, tiny):
    """A tiny model whose tokenizer begins a text with a token, or does not."""
    lm = tiny("llama")
    if not request.param:
        from tokenizers.processors import ByteLevel

        lm.tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    return lm


def ids_of(lm, text):
    return [*lm.tokenizer(text.removesuffix("</s>"))["input_ids"], lm.tokenizer.eos_token_id]


@torch.no_grad()
def loss_of(lm, ids):
    """The sum over all tokens but the first of -ln p, as transformers computes the loss of labels."""
    ids = torch.tensor([ids])
    return float(lm.module(input_ids=ids, labels=ids, use_cache=False).loss) * (ids.shape[1] - 1)


def test_every_token_of_a_text_is_scored_as_transformers_scores_labels(lm, texts):
    rows = load_rows(lm, DataOptions(eval_file=texts))
    found = rows.measure(lm, rows.test, 2, objective=rows.objective)
    every = [ids_of(lm, text) for text in TEXTS]
    expected = sum(loss_of(lm, ids) for ids in every) / sum(len(ids) - 1 for ids in every)
    assert found.log_loss == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_packed_windows_are_scored_as_transformers_scores_them(lm, texts):
    rows = load_rows(lm, DataOptions(eval_file=texts, packing=True, max_length=16))
    found = rows.measure(lm, rows.test, 3, objective=rows.objective)
    stream = [token for text in TEXTS for token in ids_of(lm, text)]
    windows = [stream[lo : lo + 17] for lo in range(0, len(stream) - 1, 16)]
    assert [[*e.sequences[0], e.candidates[0].tokens[-1]] for e in rows.test] == windows
    expected = sum(loss_of(lm, window) for window in windows) / (len(stream) - 1)
    assert found.log_loss == pytest.approx(expected, rel=1e-5)
    assert found.num_examples == len(windows)


def test_files_of_text_are_one_document_each(tmp_path):
    (tmp_path / "a.txt").write_bytes("﻿First\r\nline.\n\nSecond.".encode())
    (tmp_path / "b.md").write_text("# Title", encoding="utf-8")
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("Third")
    given = read_files(DataOptions(train_file=[tmp_path / name for name in ("a.txt", "b.md", "c.txt.gz")]))
    assert [row.columns["text"] for row in given.train.rows] == ["First\nline.\n\nSecond.", "# Title", "Third"]
    assert given.train.sizes == (1, 1, 1)
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"empty.txt is empty"):
        read_files(DataOptions(train_file=tmp_path / "empty.txt"))


def test_windows_of_a_single_document_are_held_out(tiny, tmp_path):
    (tmp_path / "book.txt").write_text("It was a dark night. " * 40, encoding="utf-8")
    lm = tiny("llama")
    rows = load_rows(lm, DataOptions(train_file=tmp_path / "book.txt", packing=True, max_length=32))
    whole = load_rows(lm, DataOptions(train_file=tmp_path / "book.txt", packing=True, max_length=32, num_dev=0))
    assert rows.train + rows.dev == whole.train and len(rows.dev) == len(whole.train) // 5 > 0
    assert rows.test == rows.dev and whole.dev == ()
    with pytest.raises(UsageError, match=r"book.txt has 8\d\d tokens, but the model reads at most 512. Give --packing"):
        load_rows(lm, DataOptions(train_file=tmp_path / "book.txt"))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "a", "labels": 1}, {}, r"no column 'label'. Did you mean 'labels'\?.*--data-format text"),
        ({"text": "a", "sentiment": 1}, {}, r"--label-column sentiment.*--data-format text"),
        ({"text": "a", "id": 1}, {"label_column": "stars"}, "no column 'stars'"),
        ({"text": "a", "id": 1}, {"compute_metrics": "rouge"}, "compute_metrics has no effect on rows of plain text"),
        ({"text": ""}, {}, "line 1: the column 'text' is empty"),
        ({"text": "a", "label": "x"}, {"packing": True}, "packing has no effect on rows of a text and its label"),
    ],
)
def test_rows_that_may_mean_labels_are_no_plain_text(tiny, tmp_path, row, options, message):
    path = write(tmp_path / "rows.jsonl", [row, {**row, "label": "y"} if "label" in row else row])
    with pytest.raises(UsageError, match=message):
        load_rows(tiny("llama"), DataOptions(eval_file=path, **options))


def test_other_columns_are_named_and_a_template_may_join_some(tiny, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "b", "title": "a", "url": "c"}])
    found = load_user_data(DataOptions(eval_file=path), tiny("llama").tokenizer)
    assert "not read: the columns 'title', 'url'" in found.notes
    options = DataOptions(eval_file=path, data_format="text", template="{title}: {text}")
    (example,) = load_user_data(options, tiny("llama").tokenizer).splits.test
    assert (example.prompt, example.candidates) == ("", ("a: b</s>",))


def test_rows_in_python_are_learnt_as_those_of_a_file(tiny, tmp_path, zotune):
    """As TRL's SFT reads `{"text": …}`, and with the bits of the command line."""
    lm, rows = tiny("llama"), [{"text": text} for text in TEXTS]
    lm.module.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "packing": True,
        "max_length": 8,
    }
    result = train(lm.module, lm.tokenizer, rows, rows, **options)
    arguments = [x for name, v in options.items() for x in (f"--{name.replace('_', '-')}", v)]
    path = write(tmp_path / "rows.jsonl", rows)
    named = ["--model", tmp_path / "model", "--train-file", path, "--eval-file", path, "--tuning", "lora"]
    arguments[arguments.index("--packing") + 1 : arguments.index("--packing") + 2] = ["--num-dev", 0]
    said = zotune("train", *named, *arguments, "--output-dir", tmp_path / "out", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["test"]["log_loss"] == result.test.log_loss


# Rows that are too long -------------------------------------------------------------------------------------

LONG = "word " * 30


@pytest.fixture
def long_rows(tiny, tmp_path):
    """A function: rows and options to the encoded rows, by a model that reads 512 tokens."""

    def make(rows, **options):
        return load_rows(tiny("llama"), DataOptions(eval_file=write(tmp_path / "rows.jsonl", rows), **options))

    return make


SHAPES = {
    "text": [{"text": "short"}, {"text": LONG}],
    "completion": [{"prompt": "p", "completion": " c"}, {"prompt": LONG, "completion": " c"}],
    "classification": [{"text": "a", "label": "no"}, {"text": LONG, "label": "yes"}],
    "choice": [
        {"prompt": "p", "choices": ["a", "b"], "label": 0},
        {"prompt": LONG, "choices": ["a", "b"], "label": 1},
    ],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_long_rows_are_cut_left_out_or_refused_and_counted(long_rows, shape):
    rows = SHAPES[shape]
    found = {how: long_rows(rows, long_rows=how, max_length=32) for how in ("truncate", "drop")}
    whole = long_rows(rows)
    assert [e.length for e in found["truncate"].test] == [whole.test[0].length, 32]
    assert "1 of 2 rows are longer than 32 tokens and were cut to it" in found["truncate"].notes
    assert found["drop"].test == whole.test[:1] and found["drop"].kept == (0,)
    assert "1 of 2 rows are longer than 32 tokens and were left out" in found["drop"].notes
    with pytest.raises(UsageError, match=r"line 2 has 1\d\d tokens, more than --max-length 32. Raise it, or give"):
        long_rows(rows, long_rows="error", max_length=32)
    with pytest.raises(UsageError, match="all 2 rows for evaluation are too long"):
        long_rows([rows[1], rows[1] | {"label": "no"}] if shape == "classification" else rows[1:] * 2,
                  long_rows="drop", max_length=32)  # fmt: skip


def test_without_a_limit_that_of_the_model_holds(long_rows):
    rows = [{"prompt": "p " * 600, "completion": " c"}, {"prompt": "p", "completion": " c"}]
    with pytest.raises(UsageError, match=r"line 1 has 12\d\d tokens, but the model reads at most 512"):
        long_rows(rows)
    assert long_rows(rows, long_rows="truncate").test[0].length == 512
    assert len(long_rows(rows, long_rows="drop").test) == 1


def test_an_answer_is_cut_only_where_the_prompt_is_cut_already(tiny, long_rows):
    row = {"prompt": "abcdefghijklmnop" * 2, "completion": " " + "x" * 60}
    (cut,) = long_rows([row], long_rows="truncate", max_length=32).test
    (scored,) = cut.candidates
    text = tiny("llama").tokenizer.decode(list(cut.sequences[0]))
    # A quarter stays with the prompt: <s> and its last tokens.
    assert (cut.length, text) == (32, "<s>jklmnop" + " " + "x" * 23)
    assert len(scored.tokens) == 25 and scored.positions[0] == 7
    with pytest.raises(UsageError, match="leaves no token of the prompt beside the candidate; raise it"):
        long_rows([row], max_length=32)


def test_predictions_are_of_the_rows_that_are_left(zotune, tmp_path):
    rows = [{"text": LONG, "label": "no"}, {"text": "b", "label": "yes"}, {"text": "c", "label": "no"}]
    path, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "predictions.jsonl"
    command = ["eval", "--model", "random:llama-tiny", "--device", "cpu", "--eval-file", path]
    said = zotune(*command, "--long-rows", "drop", "--max-length", 32, "--predictions", out)
    assert said.code == 0, said.err
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [f["prompt"] for f in found] == ["b\nLabel:", "c\nLabel:"] and [f["label"] for f in found] == [1, 0]
    assert "1 of 3 rows are longer than 32 tokens and were left out" in said.err
    (tmp_path / "a.txt").write_text("a text", encoding="utf-8")
    said = zotune(*command[:-1], tmp_path / "a.txt", "--packing", "--predictions", tmp_path / "p2")
    assert said.code == 2 and "--no-packing" in said.err


# Several files ----------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path, short):
    """The arguments of a run on two files."""
    one = write(tmp_path / "one.jsonl", [{"prompt": f"a{i}", "completion": " x"} for i in range(6)])
    (tmp_path / "two.csv").write_text("prompt,completion\nb0, y\nb1, y\n", encoding="utf-8")
    return ["--train-file", one, tmp_path / "two.csv", "--num-dev", 0, "--train-file-weights", 1, 1]


def test_files_are_mixed_by_weights(tiny, tmp_path, mixture):
    files = mixture[1:3]
    plain = load_user_data(DataOptions(train_file=files, num_dev=0), tiny("llama").tokenizer).splits
    mixed = load_user_data(
        DataOptions(train_file=files, num_dev=2, train_file_weights=(1, 1), data_seed=1), tiny("llama").tokenizer
    ).splits
    assert len(plain.train) == 8
    starts = [e.prompt[0] for e in mixed.train]
    assert starts.count("a") == starts.count("b") and not {*mixed.train} & {*mixed.dev}
    assert {*mixed.train, *mixed.dev} == {*plain.train}


def test_a_mixed_run_resumes_to_the_bits_of_one_part(zotune, short, tmp_path, mixture):
    whole = zotune(*short(*mixture, "--max-steps", 4, "--output-dir", tmp_path / "whole"))
    assert whole.code == 0, whole.err
    assert zotune(*short(*mixture, "--max-steps", 2, "--output-dir", tmp_path / "out")).code == 0
    said = zotune(*short(*mixture, "--max-steps", 4, "--output-dir", tmp_path / "out", "--resume"))
    assert said.code == 0, said.err
    ledgers = [(tmp_path / name / "ledger.zol").read_bytes() for name in ("whole", "out")]
    assert len(ledgers[0]) == len(ledgers[1]) and ledgers[0][-64:] == ledgers[1][-64:]
    other = zotune(*short(*mixture[:-1], 3, "--max-steps", 6, "--output-dir", tmp_path / "out", "--resume"))
    assert other.code == 2 and "train_file_weights" in other.err


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["1"], "1 numbers for 2 training files"),
        (["0", "1"], "numbers above 0"),
        (["x", "1"], ""),
        (["1", "1e9"], "so some of them very often"),
    ],
)
def test_weights_that_make_no_sense_are_refused(zotune, short, mixture, weights, message):
    said = zotune(*short(*mixture[:-2], *weights))
    assert said.code == 2 and message in said.err
