"""`learning_rate: auto` finds a rate by training rows alone, at a quarter of the passes, and leaves no other trace."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from zotune.directions.samplers import Subspace
from zotune.errors import NotWrittenError
from zotune.ledger import read
from zotune.llm.config.rates import default_learning_rate
from zotune.llm.config.run import with_recorded_choices
from zotune.llm.models.tuned_sets.aim import Aim, num_free
from zotune.llm.search.points import climb
from zotune.llm.training import find_rate as module
from zotune.llm.training import train as train_module
from zotune.llm.training.find_rate import Trial, choose, find_rate
from zotune.llm.training.train import train
from zotune.model.parameters import ParameterSet
from zotune.system.processes import PeerError


@pytest.fixture
def short_search(monkeypatch):
    """Searches of two trials of a step, for runs of 24 steps."""
    monkeypatch.setattr(module, "MIN_STEPS", 1)
    monkeypatch.setattr(module, "MAX_TRIALS", 2)
    return {"max_steps": 24, "logging_steps": 24, "per_device_train_batch_size": 4}


def recorded(folder):
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def test_a_search_changes_nothing_but_the_rate(config, tmp_path, short_search):
    found = train(config(learning_rate="auto", **short_search, output_dir=tmp_path / "auto"))
    rate = recorded(tmp_path / "auto")["learning_rate"]
    given = train(config(learning_rate=rate, **short_search, output_dir=tmp_path / "given"))
    assert found.num_forwards == given.num_forwards
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("auto", "given")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert [*read(tmp_path / "auto" / "ledger.zol")] == [*read(tmp_path / "given" / "ledger.zol")]
    search = json.loads((tmp_path / "auto" / "search.json").read_text(encoding="utf-8"))
    shorter = (search["num_steps"] / found.num_steps) ** (1 / 3)
    assert rate == search["learning_rate"] in [float(f"{t['learning_rate'] * shorter:.1g}") for t in search["trials"]]
    # Eleven rows: two judge in one pass. The start is judged and takes two steps, then each trial does both.
    judge, a_step = 1, 2
    expected = judge + 2 * a_step + len(search["trials"]) * (search["num_steps"] * a_step + judge)
    assert search["num_forwards"] == expected <= 0.25 * given.num_forwards


class Untouchable:
    """Rows that nobody may read."""

    def __iter__(self):
        raise AssertionError("the rows were read")

    __len__ = __getitem__ = __bool__ = __iter__


@pytest.fixture
def searched(config, short_search):
    """A function: options to the model, its rows, the config, and a maker of runs."""
    from contextlib import ExitStack

    from zotune.llm.models.load import load
    from zotune.llm.models.tuned_parameters import prepare_tuning
    from zotune.llm.output.output_folder import OutputFolder
    from zotune.llm.tasks.load_data import load_rows
    from zotune.llm.training.loop import Run

    with ExitStack() as stack:

        def make(**options):
            given = config(learning_rate="auto", **{**short_search, **options})
            lm = load(given, None, given.seed)
            prepare_tuning(lm, given)
            output = OutputFolder(given)
            stack.callback(output.close)
            return lm, load_rows(lm, given), given, lambda rows, some: Run(lm, rows, some, lm.score, output)

        yield make


def test_a_search_reads_neither_held_out_nor_evaluation_rows(searched, tmp_path):
    from dataclasses import replace

    lm, rows, given, make_run = searched(tuning="lora")
    before = {name: p.clone() for name, p in lm.module.named_parameters()}
    poisoned = replace(rows, dev=Untouchable(), test=Untouchable())
    found = find_rate(lm, poisoned, given, make_run, tmp_path)
    assert found.trials and math.isfinite(found.loss_before)
    assert all(torch.equal(p, before[name]) for name, p in lm.module.named_parameters())
    assert lm.num_forwards == 0
    # The steps of a trial read rows that do not judge it.
    judges, read = [], []
    spy = make_run(rows, given.model_copy(update={"learning_rate": 1e-3}))

    def passes(count):
        lm.num_forwards += count

    spy.objective_on = lambda examples: judges.extend(examples) or passes(1) or 1.0
    spy.take_steps = lambda count: passes(2 * count)
    find_rate(lm, rows, given, lambda some, _: read.extend(some.train) or spy, tmp_path)
    assert judges and read and not {id(e) for e in judges} & {id(e) for e in read}


def test_the_same_search_twice_gives_the_same(searched, tmp_path):
    first, again = (find_rate(*searched(output_dir=tmp_path / name), tmp_path) for name in "ab")
    assert first == again


def test_checks_of_a_first_step_count_among_the_passes(searched, tmp_path):
    lm, rows, given, make_run = searched(method="forward_grad", max_steps=150)
    found = find_rate(lm, rows, given, make_run, tmp_path)
    # A step takes one pass, and the first one checks its derivative by more of them.
    assert found.trials and found.num_forwards <= 0.25 * 150
    assert found.num_forwards > len(found.trials) * (found.num_steps + 1) + 3


def test_a_search_that_fails_leaves_the_weights_as_they_were(searched, tmp_path, monkeypatch):
    lm, rows, given, make_run = searched()
    before = {name: p.clone() for name, p in lm.module.named_parameters()}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Trials, "loss_after", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_rate(lm, rows, given, make_run, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in lm.module.named_parameters())


@pytest.mark.parametrize("kind", [PeerError, NotWrittenError])
def test_what_is_not_the_rates_fault_ends_a_search(searched, tmp_path, monkeypatch, kind):
    def lost(*_):
        raise kind("the other process ended")

    lm, rows, given, make_run = searched()
    monkeypatch.setattr(module._Trials, "take_steps", lost)
    with pytest.raises(kind):
        find_rate(lm, rows, given, make_run, tmp_path)


def test_rates_that_diverge_are_left(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "default_learning_rate", lambda *_: 1e12)
    found = find_rate(*searched(), tmp_path)
    assert found.learning_rate < 1e12


@pytest.mark.parametrize("options", [{"max_steps": 9}, {"num_train": 1}])
def test_a_run_without_room_for_a_search_takes_the_default(searched, tmp_path, capsys, options):
    lm, rows, given, make_run = searched(**options)
    found = find_rate(lm, rows, given, make_run, tmp_path)
    assert (found.trials, found.num_forwards, lm.num_forwards) == ((), 0, 0)
    assert "the default for what is tuned" in capsys.readouterr().err


def test_the_default_of_directions_within_subspaces_is_that_of_their_dimensions(searched, tmp_path):
    lm, rows, given, make_run = searched(max_steps=9)
    tensor = next(t for t in ParameterSet(lm.module) if t.parameter.dim() == 2)
    lm.aim = Aim(subspaces={tensor.name: Subspace(0, None, torch.eye(tensor.parameter.shape[1], 1))})
    found = find_rate(lm, rows, given, make_run, tmp_path)
    defaults = [default_learning_rate(given, num_free(lm.module, aim)) for aim in (lm.aim, None)]
    assert found.learning_rate == defaults[0] != defaults[1]


def test_a_resumed_run_does_not_search_again(config, tmp_path, short_search, monkeypatch):
    folder = tmp_path / "out"

    def killed(*_):
        raise KeyboardInterrupt

    resumed = config(learning_rate="auto", resume=True, **short_search)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "find_rate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(resumed)
    # Killed in the search: nothing is written, and it is made again.
    assert not (folder / "config.yaml").exists()
    train(resumed)
    rate = recorded(folder)["learning_rate"]
    assert isinstance(rate, float)
    monkeypatch.setattr(train_module, "find_rate", killed)
    assert with_recorded_choices(resumed).learning_rate == rate
    assert train(resumed).num_steps == 24
    assert (folder / "search.json").is_file()
    # A rate that is not given is the recorded one, too; another number is refused as ever.
    assert with_recorded_choices(resumed.model_copy(update={"learning_rate": None})).learning_rate == rate
    assert with_recorded_choices(resumed.model_copy(update={"learning_rate": 0.5})).learning_rate == 0.5


def test_auto_is_the_default_of_a_command_without_a_recipe(zotune, short, tmp_path):
    said = zotune(*short())
    assert said.code == 0
    assert "runs of at least 200 steps, and max_steps is 2" in said.err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": "random:llama-tiny"}), encoding="utf-8")
    said = zotune("train", recipe, *short()[1:], "--overwrite-output-dir")
    assert said.code == 0 and "search" not in said.err
    # Either way the default rate of the tuned parameters is recorded.
    assert recorded(tmp_path / "out")["learning_rate"] > 0


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        # Of the benchmark (SST-2, LoRA): the trials' best is where whole runs diverge, the one below it is best.
        ({0.009: 1.049, 0.03: 0.846, 0.09: 0.790, 0.3: 2.186}, 0.03),
        ({0.01: 0.5, 0.03: 0.9}, 0.01),
        ({0.01: 0.99, 0.03: 0.5, 0.1: math.inf}, 0.03),
        # Nothing helped: the smallest step away from the start.
        ({0.01: 1.2, 0.03: math.inf}, 0.01),
        ({0.01: math.inf, 0.03: math.inf}, 0.01),
    ],
)
def test_the_smallest_rate_with_half_of_the_best_decrease_is_taken(losses, best):
    assert choose([Trial(rate, loss) for rate, loss in losses.items()], loss_before=1.06) == best


@pytest.mark.parametrize("best", range(-3, 4))
def test_a_climb_finds_the_bottom_of_a_valley(best):
    search, tried = climb(1.0, 10.0, 9), []
    point = next(search)
    while point is not None:
        tried.append(round(math.log10(point)))
        try:
            point = search.send(abs(tried[-1] - best))
        except StopIteration:
            point = None
    assert {best - 1, best, best + 1} <= set(tried)
    assert len(tried) == len(set(tried)) <= 9


def test_a_climb_makes_no_more_trials_than_it_may():
    search, count = climb(1.0, 10.0, 3), 1
    next(search)
    with pytest.raises(StopIteration):
        while True:
            search.send(-float(count))
            count += 1
    assert count == 3


class Counting:
    """Trials whose passes are counted: each judgement and each step costs some."""

    def __init__(self, judging, first, a_step):
        self.judging, self.first, self.a_step, self.spent = judging, first, a_step, 0

    def passes(self):
        return self.spent

    def judge(self, rate):
        self.spent += self.judging
        return 1.0

    def passes_of_steps(self, rate):
        self.spent += self.first + self.a_step
        return self.first, self.a_step

    def loss_after(self, rate, steps):
        self.spent += self.first + (steps - 1) * self.a_step + self.judging
        return 0.5


@pytest.mark.parametrize("costs", [(2, 2, 2), (40, 9, 2), (7, 2, 8)])
def test_the_number_of_steps_that_a_search_asks_for_is_the_smallest_one(costs):
    needed = module._search(Counting(*costs), 0.01, 1, lambda: None)
    assert isinstance(needed, int)
    assert module._search(Counting(*costs), 0.01, needed - 1, lambda: None) == needed
    trials = Counting(*costs)
    assert module._search(trials, 0.01, needed, lambda: None).num_steps == module.MIN_STEPS
    assert trials.spent <= module.MAX_SHARE * needed * trials.a_step
