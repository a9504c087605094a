"""Evaluation in sorted, padded batches is scoring the examples one by one, in their own order."""

import math

import pytest
import torch

from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoder
from zotune.llm.scoring.accuracy import evaluate_accuracy
from zotune.llm.scoring.intervals import wilson

WORDS = (" terrible", " great")


@pytest.fixture
def examples():
    texts = ["dull", "a gorgeous film", "it never comes alive", "x", "warm and funny in all its length", "see it", "no"]
    return [Example(f"{text} It was", WORDS, i % 2) for i, text in enumerate(texts)]


def encoded(lm, examples):
    encoder = Encoder(lm.tokenizer, masked=lm.masked, context=lm.context, max_length=None)
    return [encoder(example) for example in examples]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_batches_of_any_size_are_examples_one_by_one(tiny, causal_family, examples, batch_size, plain_score):
    lm = tiny(causal_family)
    found = evaluate_accuracy(lm, encoded(lm, examples), batch_size)
    predictions, losses = [], []
    for example in examples:
        values = [plain_score(lm, example.prompt, c) for c in example.candidates]
        predictions.append(values.index(max(values)))
        losses.append(math.log(sum(map(math.exp, values))) - values[example.label])
    assert found.predictions == tuple(predictions)
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert found.num_examples == len(examples)
    assert found.accuracy == sum(p == e.label for p, e in zip(predictions, examples, strict=True)) / len(examples)
    assert found.num_forwards == math.ceil(len(examples) / batch_size)


def test_masked_models_score_the_same_in_any_batch(tiny, examples):
    lm = tiny("roberta")
    alone, together = (evaluate_accuracy(lm, encoded(lm, examples), size) for size in (1, 4))
    assert alone.predictions == together.predictions
    assert alone.loss == pytest.approx(together.loss, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_predictions_come_in_the_order_of_the_examples(tiny, examples, batch_size):
    lm = tiny("llama")
    rows = encoded(lm, examples)
    batches = []

    def scorer(batch):
        lengths = [len(s) for s in batch.sequences]
        batches.append(lengths)
        return torch.tensor([[0.0, 1.0] if n % 3 == 0 else [1.0, 0.0] for n in lengths], dtype=torch.float64)

    found = evaluate_accuracy(lm, rows, batch_size, scorer)
    assert found.predictions == tuple(int(row.length % 3 == 0) for row in rows)
    flat = [n for batch in batches for n in batch]
    assert flat == sorted(flat, reverse=True)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (1, 2), (437, 872), (800, 872)])
def test_intervals_are_wilsons(hits, n):
    z, p = 1.959963984540054, hits / n
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(centre + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert wilson(hits, n) == pytest.approx(expected, abs=1e-12)
