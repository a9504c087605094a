"""The best step is the one that held-out rows say, its weights come back to the bit, and reported rows say nothing."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from zotune.errors import RunError, UsageError
from zotune.llm.config.selection import SelectionOptions
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import load
from zotune.llm.scoring.accuracy import AccuracyEvaluation, evaluate_accuracy
from zotune.llm.scoring.perplexity import LogLossEvaluation
from zotune.llm.tasks.load_data import load_rows
from zotune.llm.training import best_model as selection_module
from zotune.llm.training.best_model import BestModelTracker
from zotune.llm.training.train import train

PLAIN = AccuracyEvaluation(
    accuracy=0.5, low=0.0, high=1.0, num_examples=10, loss=1.0, predictions=(), seconds=0.0, num_forwards=1
)
KEEPING = {"eval_steps": 1, "load_best_model_at_end": True}


def seen(tmp_path, evaluations, **options):
    """A selection after evaluations 0, 1, … given as (loss, accuracy), and the weight that it restores."""
    weight = nn.Parameter(torch.zeros(1))
    chosen = BestModelTracker(SelectionOptions(eval_steps=1, **options), [weight], tmp_path)
    for step, (loss, accuracy) in enumerate(evaluations):
        weight.data.fill_(step)
        chosen.observe(step, replace(PLAIN, loss=loss, accuracy=accuracy))
        if chosen.is_exhausted:
            break
    chosen.restore()
    return chosen, float(weight.detach())


@pytest.mark.parametrize(
    ("by", "evaluations", "best"),
    [
        ("loss", [(1.0, 0.5), (0.5, 0.4), (0.7, 0.9)], 1),
        ("metric", [(1.0, 0.5), (0.5, 0.4), (0.7, 0.9)], 2),
        ("loss", [(1.0, 0.5), (0.5, 0.4), (0.5, 0.9)], 1),
        ("metric", [(1.0, 0.5), (0.5, 0.5), (0.7, 0.4)], 0),
        ("loss", [(math.nan, 0.5), (2.0, 0.5), (math.nan, 0.9)], 1),
        ("loss", [(1.0, 0.5), (-math.inf, 0.5), (2.0, 0.9)], 1),
    ],
)
def test_the_best_is_restored_and_of_equals_the_earlier(tmp_path, by, evaluations, best):
    chosen, weight = seen(tmp_path, evaluations, load_best_model_at_end=True, metric_for_best_model=by)
    assert (chosen.step, weight) == (best, best)
    assert chosen.best.loss == evaluations[best][0]


@pytest.mark.parametrize("by", ["loss", "metric"])
def test_of_log_losses_the_lower_is_better(tmp_path, by):
    chosen = BestModelTracker(
        SelectionOptions(eval_steps=1, early_stopping_patience=9, metric_for_best_model=by), [], tmp_path
    )
    for step, value in enumerate((3.0, 1.0, 2.0)):
        chosen.observe(step, LogLossEvaluation(0.0, 9.0, 5, value, (), 0.0, 1, value, math.exp(value)))
    assert chosen.step == 1


@pytest.mark.parametrize(
    ("patience", "losses", "last"),
    [
        (1, [3, 2, 2, 1], 2),
        (2, [3, 4, 2, 5, 2, 1], 4),
        (2, [3, 4, 5, 1], 2),
        (3, [3, 4, 5, 1, 2, 2], 5),
        (2, [3, 2, math.nan, math.nan, 1], 3),
    ],
)
def test_patience_counts_evaluations_in_a_row_without_a_new_best(tmp_path, patience, losses, last):
    chosen, weight = seen(tmp_path, [(float(loss), 0.5) for loss in losses], early_stopping_patience=patience)
    # Nothing was to be kept, so the last weights stay.
    assert weight == last
    assert chosen.is_exhausted == (chosen.num_waited == patience)
    assert chosen.step == losses.index(min(v for v in losses[: last + 1] if v == v))


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restored_weights_are_the_same_bits_wherever_they_were_kept(tmp_path, monkeypatch, in_file, dtype):
    if in_file:
        monkeypatch.setattr(selection_module, "MAX_MEMORY", 0)
    tuned = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((3, 5), (7,), (2, 2, 3))]
    tuned.append(nn.Parameter(torch.randn(4, 6).to(dtype).t()))
    tuned[0].data[0, 0], tuned[0].data[0, 1] = -0.0, math.nan
    before = [p.detach().clone() for p in tuned]
    chosen = BestModelTracker(SelectionOptions(**KEEPING), tuned, tmp_path)
    chosen.observe(0, PLAIN)
    for p in tuned:
        p.data.add_(1.0)
    chosen.observe(1, replace(PLAIN, loss=2.0))
    chosen.restore()
    bits = {2: torch.int16, 4: torch.int32}[before[0].element_size()]
    for p, was in zip(tuned, before, strict=True):
        assert torch.equal(p.detach().contiguous().view(bits), was.contiguous().view(bits))
    # Whatever ends the process, nothing is left behind.
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_for_the_best_model_is_reported_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(selection_module, "MAX_MEMORY", 0)
    monkeypatch.setattr("os.pwrite", lambda *_: 0)
    chosen = BestModelTracker(SelectionOptions(**KEEPING), [nn.Parameter(torch.zeros(9))], tmp_path)
    with pytest.raises(RunError, match=r"could not be stored in .*leave out --load-best-model-at-end"):
        chosen.observe(0, PLAIN)


# Whole runs ------------------------------------------------------------------------------------------------


def scripted(monkeypatch, values):
    """Let evaluations of the held-out rows find these losses, in turn; and keep the weights of each moment."""
    from zotune.llm.training import loop as run_module

    waiting, weights, real = list(values), [], run_module.Run.evaluate

    def evaluate(self, examples):
        found = real(self, examples)
        if examples != self.rows.dev or not waiting:
            return found
        weights.append({name: p.detach().clone() for name, p in self.lm.module.named_parameters()})
        return replace(found, loss=waiting.pop(0))

    monkeypatch.setattr(run_module.Run, "evaluate", evaluate)
    return weights


def saved(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


METHODS = [
    {"method": "zo_sgd"},
    {"method": "zo_adam", "dtype": "bfloat16"},
    {"method": "zo_sgd_cons"},
    {"method": "forward_grad"},
    {"method": "fo_sgd"},
    {"method": "fo_adam"},
    {"method": "zo_sgd", "hybrid_layers": 1, "hybrid_tied": "frozen"},
]


@pytest.mark.sample(4)
@pytest.mark.parametrize("options", METHODS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_saved_model_is_that_of_the_best_step_to_the_bit(config, tmp_path, monkeypatch, options):
    weights = scripted(monkeypatch, [3.0, 2.0, 1.0, 1.0, 2.0])
    result = train(config(**options, **KEEPING, max_steps=4, learning_rate=1e-2))
    assert (result.best_step, result.num_steps, result.stopped_early) == (2, 4, False)
    found = saved(tmp_path / "out")
    assert all(torch.equal(found[name], weights[2][name]) for name in found)
    assert not all(torch.equal(found[name], weights[3][name]) for name in found)
    assert result.dev.loss == 1.0
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["best_step"] for line in lines if "dev" in line] == [1, 2, 2, 2]
    assert json.loads((tmp_path / "out/results.json").read_text())["best_step"] == 2
    assert "best step | 2" in (tmp_path / "out/README.md").read_text()


def test_what_is_reported_is_what_the_saved_model_does(config, tmp_path):
    """The held-out result of the best step is found again by evaluating the folder."""
    made = config(**KEEPING, tuning="lora", max_steps=5, learning_rate=2.0)
    result = train(made)
    assert result.best_step < 5
    lm = load(made.model_copy(update={"model": str(tmp_path / "out")}))
    found = evaluate_accuracy(lm, load_rows(lm, made).dev, 32)
    assert (found.predictions, found.loss) == (result.dev.predictions, pytest.approx(result.dev.loss, abs=1e-6))


def test_a_run_that_only_gets_worse_gives_back_the_untuned_model(config, tmp_path, monkeypatch):
    weights = scripted(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    result = train(config(**KEEPING, early_stopping_patience=2, max_steps=9, learning_rate=1e-2))
    assert (result.best_step, result.num_steps, result.stopped_early) == (0, 2, True)
    found = saved(tmp_path / "out")
    assert all(torch.equal(found[name], weights[0][name]) for name in found)


def test_a_run_that_fails_saves_the_best_model_that_it_was_to_keep(config, tmp_path, monkeypatch):
    from zotune.llm.training import loop as run_module

    weights = scripted(monkeypatch, [3.0, 1.0, 2.0])
    real = run_module.update_of

    def breaking(*args):
        update, left = real(*args), [2]

        def step(*more):
            if not left[0]:
                raise RunError("the loss was NaN")
            left[0] -= 1
            return update(*more)

        return step

    monkeypatch.setattr(run_module, "update_of", breaking)
    with pytest.raises(RunError):
        train(config(**KEEPING, max_steps=9, learning_rate=1e-2))
    found = saved(tmp_path / "out")
    assert all(torch.equal(found[name], weights[1][name]) for name in found)
    assert not all(torch.equal(found[name], weights[2][name]) for name in found)


def test_without_the_option_the_last_weights_are_the_result(config, tmp_path, monkeypatch):
    weights = scripted(monkeypatch, [3.0, 1.0, 2.0, 2.5, 2.6])
    result = train(config(eval_steps=1, early_stopping_patience=2, max_steps=9, learning_rate=1e-2))
    assert (result.best_step, result.num_steps, result.stopped_early) == (1, 3, True)
    found = saved(tmp_path / "out")
    assert all(torch.equal(found[name], weights[3][name]) for name in found)


def test_the_last_step_is_evaluated_where_it_may_be_the_best(config, monkeypatch):
    scripted(monkeypatch, [3.0, 2.0, 1.0])
    assert train(config(eval_steps=2, load_best_model_at_end=True, max_steps=3)).best_step == 3


@pytest.mark.parametrize("options", [{}, {"tuned_layers": 1}], ids=["plain", "reused"])
def test_reported_rows_are_read_by_no_forward_pass_before_the_end(config, tmp_path, monkeypatch, options):
    """The tokens of every forward pass are noted; those of evaluation rows come last, each row once."""
    other = tmp_path / "other.jsonl"
    texts = ("seen by nobody", "kept for the last", "a third")
    other.write_text("".join(json.dumps({"text": t, "label": "yes"}) + "\n" for t in texts), encoding="utf-8")
    made = config(**KEEPING, **options, max_steps=3, learning_rate=1e-2, eval_file=other)
    read, real = [], LanguageModel.read

    def note(self, input_ids, attention_mask):
        read.extend(tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True))
        return real(self, input_ids, attention_mask)

    monkeypatch.setattr(LanguageModel, "read", note)
    train(made)
    monkeypatch.setattr(LanguageModel, "read", real)
    reported = {s for e in load_rows(load(made), made).test for s in e.sequences}
    places = [i for i, s in enumerate(read) if s in reported]
    assert len(reported) == 3 * 2
    assert {read[i] for i in places} == reported
    # With reuse the lower layers read them once, and the upper ones once more, in the same evaluation.
    assert len(places) == len(reported) * (2 if options else 1)
    assert places == list(range(len(read) - len(places), len(read)))


def test_choosing_by_the_rows_that_are_reported_is_said_aloud(config, capsys, tmp_path, rows_file):
    train(config(**KEEPING))
    assert re.search("makes the report too optimistic; give other evaluation rows", capsys.readouterr().err)
    train(config(**KEEPING, eval_file=rows_file, output_dir=tmp_path / "other"))
    assert "optimistic" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"load_best_model_at_end": True},
            "load_best_model_at_end compares evaluations during the run: give --eval-steps",
        ),
        ({"early_stopping_patience": 2}, "early_stopping_patience compares .* give --eval-steps"),
        ({"metric_for_best_model": "metric"}, "metric_for_best_model has no effect here"),
        ({"early_stopping_patience": 0, "eval_steps": 1}, "greater than or equal to 1"),
        ({**KEEPING, "num_dev": 0}, "no held-out row to select the best step by: give --num-dev above 0"),
    ],
)
def test_a_selection_that_cannot_work_is_refused_before_the_run(config, options, message):
    with pytest.raises((UsageError, ValueError), match=message):
        train(config(**options))
