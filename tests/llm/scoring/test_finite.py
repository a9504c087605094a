"""An evaluation without finite scores is an error that names the row, for every metric; odd rows have known values."""

import json

import pytest
import torch

from zotune.errors import NonFiniteScoreError, UsageError
from zotune.llm.config.run import EvalConfig
from zotune.llm.data.collator import collate
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoder
from zotune.llm.scoring.accuracy import evaluate_accuracy
from zotune.llm.scoring.generated_answers import evaluate_answers
from zotune.llm.scoring.generation import Sampling, generate
from zotune.llm.scoring.objectives import ACCURACY, TEACHER_FORCING, mean_loss
from zotune.llm.scoring.perplexity import evaluate_log_loss
from zotune.llm.scoring.rewards import GeneratedObjective
from zotune.llm.training.evaluation import evaluate
from zotune.llm.training.train import train

SINGLE, SEVERAL = (" a", " b"), (" great", " bad")
BAD = "Zebra"  # the one row whose first letter is Z


def poison(lm, letter, value=float("nan")):
    """Rows that contain a letter get logits without a number, as an overflow makes them; others are as before."""
    token = lm.tokenizer(letter, add_special_tokens=False)["input_ids"][-1]
    embeddings = lm.base.get_input_embeddings()
    with torch.no_grad():
        embeddings.weight[token] = value
    return lm


def encoded(lm, texts, words=SINGLE, **options):
    encoder = Encoder(lm.tokenizer, masked=lm.masked, context=lm.context, max_length=None)
    return [encoder(Example(text, words, 0, **options), f"rows.csv, line {i}") for i, text in enumerate(texts, start=2)]


TEXTS = ("one is", "a longer row is", f"{BAD} is", "so is")


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("measure", "words", "more"),
    [
        (evaluate_accuracy, SINGLE, {}),
        (evaluate_accuracy, SEVERAL, {}),
        (evaluate_log_loss, (" great",), {}),
        (evaluate_answers, (" great",), {"answers": ("great",)}),
    ],
)
def test_a_row_without_numbers_is_named(tiny, measure, words, more, size):
    lm = tiny("qwen3")
    with torch.no_grad():  # untied, so that logits of the other rows stay finite
        lm.base.lm_head.weight = torch.nn.Parameter(lm.base.lm_head.weight.clone())
    poison(lm, "Z")
    rows = encoded(lm, TEXTS, words, **more)
    with pytest.raises(NonFiniteScoreError, match=r"^rows.csv, line 4: "):
        measure(lm, rows, size)
    assert measure(lm, [row for row in rows if "line 4" not in row.place], size).num_examples == 3


def test_masked_models_name_the_row_too(tiny):
    lm = poison(tiny("roberta"), "Z")
    with pytest.raises(NonFiniteScoreError, match=r"^rows.csv, line 4: "):
        evaluate_accuracy(lm, encoded(lm, TEXTS, SEVERAL, suffix="."), 1)


@pytest.mark.parametrize("sampling", [None, Sampling(0.7, 0.9, (1, 2))])
def test_text_is_not_generated_from_logits_that_are_no_numbers(tiny, sampling):
    lm = tiny("llama")
    with torch.no_grad():
        lm.base.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteScoreError, match=r"^prompt 1: "):
        generate(lm, [(5, 6), (7, 8, 9)], 3, sampling=sampling)


def test_objectives_without_a_gradient_are_not_finite_either(tiny):
    """`argmax` of NaN is an index, so that a step would take a diverged probe for the better one."""
    lm = tiny("llama")
    with torch.no_grad():
        lm.base.lm_head.weight.fill_(float("nan"))
    rows = encoded(lm, TEXTS)
    batch = collate(rows, 1, lm.device)
    assert mean_loss(ACCURACY, lm.score(batch), batch, rows).isnan()
    config = EvalConfig(model="random:llama-tiny", task="sst2", objective="accuracy")
    reward = GeneratedObjective("any", lambda completions: [1.0] * len(completions), config)
    prompts = [Encoder(lm.tokenizer, masked=False, context=512, max_length=None)(Example("x", (), 0))]
    assert reward.closure(lm, prompts, 0, [0])().isnan()
    with pytest.raises(NonFiniteScoreError, match="an example"):
        reward.measure(lm, prompts, 1)


@pytest.fixture
def nan_model(tiny, tmp_path):
    """The folder of a model with a head of NaN."""
    lm = tiny("llama")
    with torch.no_grad():
        lm.base.lm_head.weight.fill_(float("nan"))
    lm.base.save_pretrained(tmp_path / "nan")
    lm.tokenizer.save_pretrained(tmp_path / "nan")
    return tmp_path / "nan"


def test_eval_names_file_and_line(nan_model, rows_file, capsys):
    from zotune.cli.main import run

    with pytest.raises(NonFiniteScoreError, match=r"rows.jsonl.* line \d+: the model's best score is nan"):
        evaluate(EvalConfig(model=str(nan_model), eval_file=rows_file, device="cpu"))
    assert run(["eval", "--model", str(nan_model), "--eval-file", str(rows_file), "--device", "cpu"]) == 1
    assert "the model's best score is nan" in capsys.readouterr().err


def test_a_training_run_does_not_report_an_evaluation_of_nothing(nan_model, config):
    with pytest.raises(NonFiniteScoreError, match=r"rows.jsonl"):
        train(config(model=str(nan_model)))


# Odd rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [evaluate_accuracy, evaluate_log_loss, evaluate_answers])
def test_no_row_is_an_error_in_words(tiny, measure):
    with pytest.raises(UsageError, match="no row to evaluate on"):
        measure(tiny("llama"), [], 4)


def test_a_batch_size_below_one_is_an_error(tiny):
    lm = tiny("llama")
    with pytest.raises(UsageError, match="at least 1"):
        evaluate_accuracy(lm, encoded(lm, TEXTS), -1)


@pytest.mark.parametrize(
    ("scores", "predictions", "ties"),
    [
        ([[0.0, 0.0], [1.0, 2.0], [-1.0, -1.0]], (0, 1, 0), 2),
        ([[2.0, 1.0], [0.0, 1.0], [3.0, -torch.inf]], (0, 1, 0), 0),
    ],
)
def test_equal_best_scores_are_counted_and_the_first_one_counts(tiny, scores, predictions, ties):
    lm = tiny("llama")
    rows = encoded(lm, ["same is"] * 3)
    found = evaluate_accuracy(lm, rows, 3, lambda batch: torch.tensor(scores, dtype=torch.float64))
    assert (found.predictions, found.num_ties) == (predictions, ties)
    assert found.summary()["num_ties"] == ties
    assert ("equal best scores" in str(found)) == (ties > 0)


def test_rows_of_one_class_have_its_accuracy(tiny):
    lm = tiny("llama")
    rows = encoded(lm, ["same is"] * 3)
    for right, accuracy in ((0, 1.0), (1, 0.0)):
        score = torch.tensor([[1.0 - right, float(right)]] * 3, dtype=torch.float64)
        found = evaluate_accuracy(lm, rows, 3, lambda batch, score=score: score)
        assert (found.accuracy, found.low <= accuracy <= found.high) == (accuracy, True)


def test_the_place_of_a_row_is_no_part_of_it(tiny):
    """So that the digest of rows, by which a ledger knows them, does not depend on their file's name."""
    lm = tiny("llama")
    encoder = Encoder(lm.tokenizer, masked=False, context=512, max_length=None)
    example = Example("one is", SINGLE, 0)
    one, other = encoder(example, "a.csv, line 1"), encoder(example, "b.csv, line 7")
    assert one == other
    assert repr(one) == repr(other)
    assert TEACHER_FORCING.reads(one).place == "a.csv, line 1"


def test_results_hold_the_number_of_ties(rows_file):
    options = {"model": "random:llama-tiny", "eval_file": rows_file, "device": "cpu"}
    _, entries = evaluate(EvalConfig.model_validate(options))
    assert json.loads(json.dumps(entries["num_ties"])) == 0
