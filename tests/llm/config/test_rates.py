"""The default learning rates are those that searches on held-out rows chose; rates far from them are named."""

import json
from pathlib import Path

import pytest

from zotune.errors import UsageError
from zotune.llm.config.rates import default_learning_rate, learning_rate_range, mu_range, warnings
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.schema import validate
from zotune.llm.config.tuning import IN_SUBSPACE

CELLS = Path(__file__).parents[3] / "benchmarks" / "results" / "bench" / "cpu"
# Cells of one method at one query; the chosen rate lies in the middle of their grids.
CHOSEN = [*CELLS.glob("table2/*.json"), *CELLS.glob("tasks/*sst2.json")]
# MeZO's on OPT-13B (Malladi et al., 2023, table of hyper-parameters): tuning, tuned parameters, rate.
MEZO = [("full", 12_853_000_000, 1e-6), ("lora", 6_553_600, 1e-4), ("prefix", 2_048_000, 1e-2)]


def options(**given):
    return TrainConfig(task="sst2", **given)


@pytest.mark.parametrize("path", CHOSEN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_default_is_what_the_benchmarks_search_chose_within_a_grid_step(path):
    cell = json.loads(path.read_text(encoding="utf-8"))
    method, tuning = cell["coordinates"]["method"], cell["coordinates"]["tuning"]
    default = default_learning_rate(options(method=method, tuning=tuning), cell["runs"][0]["num_tuned"])
    assert default / 3.5 < cell["chosen"]["learning_rate"] < default * 3.5


@pytest.mark.parametrize(("tuning", "num_tuned", "rate"), MEZO)
def test_a_default_is_what_mezo_used_at_thirteen_billion(tuning, num_tuned, rate):
    assert rate / 2 < default_learning_rate(options(tuning=tuning), num_tuned) < rate * 2


@pytest.mark.parametrize(("num_queries", "rate"), [(1, 0.01), (4, 0.03), (16, 0.1)])
def test_more_queries_take_a_larger_rate_as_in_the_benchmark(num_queries, rate):
    default = default_learning_rate(options(tuning="lora", num_queries=num_queries), 13_056)
    assert rate / 2 < default < rate * 2


def test_every_method_and_scheme_has_a_default_within_its_range():
    from typing import get_args

    for method in get_args(TrainConfig.model_fields["method"].annotation):
        for tuning in get_args(TrainConfig.model_fields["tuning"].annotation):
            if tuning == "lora_xs" and method not in IN_SUBSPACE:
                continue  # refused
            if tuning in ("prefix", "prompt") and method == "grzo":
                continue  # refused
            given = options(method=method, tuning=tuning, peft_type="ia3" if tuning == "peft" else None)
            for num_tuned in (0, 1, 10**3, 10**11):
                low, high = learning_rate_range(given, num_tuned)
                assert 0 < low < default_learning_rate(given, num_tuned) < high
            assert warnings(given, 10**6, half_precision=False) == []


@pytest.mark.parametrize(("tuning", "mu"), [("full", 1e-3), ("head", 1e-3), ("lora", 1e-2), ("prefix", 1e-1)])
def test_mu_depends_on_what_is_tuned(tuning, mu):
    assert options(tuning=tuning).mu == mu
    assert options(tuning=tuning, mu=0.5).mu == 0.5
    assert validate(TrainConfig, {"tuning": tuning, "task": "sst2"}, "recipe").mu == mu


def test_a_rate_far_from_the_default_is_named_with_its_range():
    # The old default with full tuning of a 13B model: a thousand times too high.
    (warning,) = warnings(options(learning_rate=1e-3), 13_000_000_000, half_precision=False)
    assert warning.startswith(
        "the learning rate 0.001 is above the range 1e-08 to 1e-05 in which zo_sgd on 13,000,000,000"
    )
    assert "Begin with 1e-06, or give --learning-rate auto" in warning
    (warning,) = warnings(options(learning_rate=1e-9, tuning="lora"), 13_056, half_precision=False)
    assert "is below the range 9e-05 to 0.09" in warning
    for silent in ({"learning_rate": 0.0}, {"learning_rate": 1e-6}, {"learning_rate": "auto"}, {}):
        assert warnings(options(**silent), 13_000_000_000, half_precision=False) == []


def test_a_mu_far_from_the_default_is_named_and_half_precision_wants_a_larger_one():
    assert "mu 1 is above the range 1e-05 to 0.01" in warnings(options(mu=1.0), 10**6, half_precision=False)[0]
    assert warnings(options(mu=5e-5), 10**6, half_precision=False) == []
    assert "mu 5e-05 is below the range 0.0001 to 0.01" in warnings(options(mu=5e-5), 10**6, half_precision=True)[0]
    assert mu_range(options(tuning="prefix"), half_precision=True).high == 1.0
    # A method without probes has no mu.
    assert warnings(options(method="forward_grad", mu=9.0), 10**6, half_precision=False) == []


@pytest.mark.parametrize("value", ["fast", "-1", -1e-9, "nan", "inf", [1e-3], {}])
def test_a_learning_rate_is_a_number_or_auto(value):
    with pytest.raises(UsageError, match=r"recipe: learning_rate is .*(or auto|at least 0)"):
        validate(TrainConfig, {"learning_rate": value, "task": "sst2"}, "recipe")
