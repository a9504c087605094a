"""Packed texts hold every token once, in windows of one length; mixed files have the shares that they are given."""

from collections import Counter

import numpy as np
import pytest

from zotune.errors import UsageError
from zotune.llm.data.mixing import mixed
from zotune.llm.data.packing import packed


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
def test_every_token_but_the_first_is_predicted_once_from_the_ones_before_it(length):
    generator = np.random.RandomState(length)
    texts = [tuple(generator.randint(0, 99, generator.randint(0, 30)).tolist()) for _ in range(20)]
    stream = [token for text in texts for token in text]
    windows, at = list(packed(texts, length)), 0
    for window in windows:
        (read,), (scored,) = window.sequences, window.candidates
        assert len(read) == length or window is windows[-1]
        for position, token in zip(scored.positions, scored.tokens, strict=True):
            at += 1
            assert token == stream[at] and read[position] == stream[at - 1]
        assert len(scored.tokens) == len(read)
    assert at == len(stream) - 1


def test_too_few_tokens_make_no_window():
    assert list(packed([], 4)) == list(packed([(7,)], 4)) == []


@pytest.mark.parametrize(
    ("sizes", "weights"), [((10, 10), (2, 1)), ((100, 7, 31), (1, 1, 2)), ((5, 3), (5, 3)), ((9, 4), (0.3, 0.1))]
)
def test_files_have_the_shares_of_their_weights_and_no_row_is_left_out(sizes, weights):
    rows = mixed(sizes, weights, seed=3)
    assert rows == mixed(sizes, weights, seed=3)
    counts = Counter(rows)
    assert counts.keys() == set(range(sum(sizes)))
    ends = np.cumsum(sizes)
    share = np.bincount(np.searchsorted(ends, rows, side="right"), minlength=len(sizes)) / len(rows)
    assert share == pytest.approx(np.array(weights) / sum(weights), abs=0.5 / min(sizes))
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        times = [counts[i] for i in range(first, last)]
        assert max(times) - min(times) <= 1


def test_another_seed_repeats_other_rows_and_a_mistake_is_refused():
    assert mixed([20, 50], [1, 1], seed=0) != mixed([20, 50], [1, 1], seed=1)
    with pytest.raises(UsageError, match=r"a pass would read .* of 1,001, so some of them very often.*1000, 1"):
        mixed([1000, 1], [1, 1000], seed=0)
    with pytest.raises(UsageError, match="training file 2 of 2 has no row"):
        mixed([3, 0], [1, 1], seed=0)
