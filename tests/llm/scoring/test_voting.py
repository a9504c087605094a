"""A randopt run's best points vote: each point's answers are those of a model whose weights were moved by hand."""

from collections import Counter
from math import nan
from types import SimpleNamespace

import pytest
import torch

import zotune as zo
from zotune.errors import UsageError
from zotune.ledger import read
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.llm.ledger import voting
from zotune.llm.ledger.voting import evaluate
from zotune.llm.models.load import load
from zotune.llm.scoring.accuracy import AccuracyEvaluation, Evaluation
from zotune.llm.scoring.voting import elected
from zotune.llm.training import evaluation
from zotune.llm.training.step import check_first_estimate
from zotune.llm.training.train import train

RUN = {"model": "random:opt-tiny", "task": "sst2", "device": "cpu", "dtype": "float32", "num_eval": 8, "num_dev": 0}
POINTS = {"method": "randopt", "num_queries": 4, "keep_best": 3, "mu": 0.05, "learning_rate": 0.05, "num_train": 8}


def run_of(folder, **options):
    train(TrainConfig.model_validate({**RUN, **POINTS, "output_dir": folder, **options}))
    return str(folder)


def of_rows(model, **options):
    config = EvalConfig.model_validate({**RUN, "dtype": "auto", "model": str(model), **options})
    return next(iter(evaluate(config)[0].values())).evaluation


def test_the_best_points_of_the_last_step_vote_around_the_weights_before_it(tmp_path):
    whole = run_of(tmp_path / "two", max_steps=2, only_better=False)
    before = run_of(tmp_path / "one", max_steps=1, only_better=False)
    found = of_rows(whole, vote=True)
    config = EvalConfig.model_validate({**RUN, "model": before})
    lm = load(config)
    for p in lm.module.parameters():
        p.requires_grad_(True)
    opt = zo.randopt(lm.module, 0.05, num_queries=4, seed=0)
    opt.num_steps = 1
    start = {name: p.detach().clone() for name, p in lm.module.named_parameters()}
    moves = [{name: 0.05 * u.of(lm.module, name) for name in start} for u in opt.directions()]
    ballots = []
    for c, move in zip(read(tmp_path / "two" / "ledger.zol")[1].coefficients, moves, strict=True):
        if c:
            with torch.no_grad():
                for name, p in lm.module.named_parameters():
                    p.copy_(start[name] + move[name])
            result, _ = evaluation.evaluate(config, lambda config: (lm, lambda measure: measure))
            ballots.append(result["sst2"].evaluation.predictions)
    assert len(ballots) == 3 and len(set(ballots)) > 1
    majority = tuple(min(Counter(row).items(), key=lambda n: (-n[1], n[0]))[0] for row in zip(*ballots, strict=True))
    assert found.predictions == majority
    assert found.predictions != of_rows(whole).predictions or set(ballots) != {majority}
    assert found.num_forwards == 3 * of_rows(whole).num_forwards


def of_answers(*predictions):
    n = len(predictions)
    return AccuracyEvaluation(0, 1, n, 0.5, predictions, 1.0, 1, accuracy=0.0)


class Texts(Evaluation):
    """An evaluation of generated text."""

    metric = "f1"


class Row:
    """An example whose first candidate is right."""

    def is_right(self, chosen):
        return chosen == 0


def test_the_most_frequent_answer_is_elected_and_ties_go_to_the_first():
    found = elected([of_answers(2, 0, 1), of_answers(2, 1, 1), of_answers(0, 2, 1), of_answers(0, 0, 1)], [Row()] * 3)
    assert found.predictions == (0, 0, 1)
    assert (found.accuracy, found.num_ties, found.num_forwards, found.loss) == (2 / 3, 1, 4, 0.5)
    with pytest.raises(UsageError, match="these rows are judged by f1"):
        elected([Texts(0, 1, 3, 0.5, ("a", "b", "c"), 1.0, 1)], [Row()] * 3)


def record(step, *coefficients, is_skipped=False):
    return SimpleNamespace(step=step, coefficients=coefficients, is_skipped=is_skipped)


REFUSED = {
    "another method": ({"method": "zo_sgd"}, [], "was tuned by zo_sgd"),
    "other weights": (
        {"method": "randopt", "blocks": "layer", "block_order": "sequential"},
        [],
        "lie around other weights in each block",
    ),
    "no point": ({"method": "randopt"}, [record(0, 0.0, 0.0), record(1, nan, nan, is_skipped=True)], "kept a point"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_without_points_is_refused(name, monkeypatch):
    options, records, reason = REFUSED[name]
    monkeypatch.setattr(voting, "find_ledger", lambda path: records)
    monkeypatch.setattr(voting, "config_of", lambda ledger, device: TrainConfig.model_validate({**RUN, **options}))
    with pytest.raises(UsageError, match=reason):
        evaluate(EvalConfig(model="runs/a", task="sst2", vote=True))


def test_a_first_step_without_a_better_point_is_no_error_of_mu():
    model = torch.nn.Linear(3, 1, bias=False)
    opt = zo.randopt(model, 0.1)
    flat = opt.estimate(lambda: -model.weight.square().sum() * 0 + 1)
    assert not any(c for c, _ in flat.terms)
    check_first_estimate(opt, flat, mu=1e-3)
    with pytest.raises(UsageError, match="below the resolution"):
        check_first_estimate(zo.zo_sgd(model, 0.1), flat, mu=1e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"dtype": "bfloat16"}, "leave out dtype"), ({"compute_metrics": ["rouge"]}, "judges what one model answers")],
)
def test_vote_takes_the_model_as_it_was_trained(options, reason):
    with pytest.raises(UsageError, match=reason):
        evaluate(EvalConfig.model_validate({"model": "runs/a", "task": "sst2", "vote": True, **options}))


def test_without_vote_the_saved_weights_are_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *given: asked.append(given))
    config = EvalConfig(task="sst2")
    evaluate(config)
    assert asked == [(config,)]
