"""Runs with one direction an example: coefficients of single rows, with reused activations, ledgers, refusals."""

import pytest
import torch

import zotune as zo
from zotune.ledger import FreeLayout, read
from zotune.llm.data.collator import collate
from zotune.llm.models.activation_cache import SequenceCache
from zotune.llm.models.activation_storage.tiers import ActivationStore
from zotune.llm.models.load import load
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.scoring.objectives import mean_loss
from zotune.llm.tasks.load_data import load_rows
from zotune.llm.training.in_memory import MemoryOutput
from zotune.llm.training.loop import Run
from zotune.llm.training.train import train


def run_of(made, *, cached=False):
    lm = load(made)
    prepare_tuning(lm, made)
    lm.module.double()
    rows = load_rows(lm, made)
    scorer = lm.score
    if cached:
        cache = SequenceCache(lm, ActivationStore(), [[s for e in rows.train for s in e.sequences]])
        assert cache.depth
        scorer = cache.score
    return Run(lm, rows, made.model_copy(update={"learning_rate": 1e-3, "max_steps": 2}), scorer, MemoryOutput())


@pytest.mark.parametrize(
    "options",
    [
        {"tuning": "lora", "objective": "teacher_forcing"},
        {"tuning": "lora", "rank": 1, "model": "random:qwen3-tiny"},
        {"tuning": "full", "rank": 1, "objective": "teacher_forcing", "per_device_train_batch_size": 2},
        {"tuning": "full", "flipped": True, "model": "random:opt-tiny"},
        {"tuning": "full", "flipped": True, "model": "random:gemma3-tiny"},
        {"tuning": "full", "tuned_parameters": "norm", "tuned_layers": 1, "cached": True},
        {"tuning": "lora", "method": "forward_grad", "model": "random:qwen3-tiny"},
    ],
    ids=repr,
)
def test_coefficients_are_slopes_of_single_rows(config, options):
    cached = options.pop("cached", False)
    made = config(**{"gradient_accumulation_steps": 2, **options}, directions_per_batch=4, mu=1e-2)
    # A derivative is compared with a difference that is short, and rounded; a difference with the same one.
    mu, bound = (1e-3, 1e-2) if made.method == "forward_grad" else (1e-2, 1e-3)
    run = run_of(made, cached=cached)
    examples = run.rows.train[:4]
    closures, weights = run._closures(examples)
    estimate = run.optimizer.estimate(zo.accumulate(closures, weights))
    order = sorted(range(4), key=lambda i: examples[i].length)
    total = sum(run.rows.objective.weight(e) for e in examples)
    for (c, u), i in zip(estimate.terms, order, strict=True):
        example = examples[i]
        batch = collate([example], run.lm.pad_token_id, run.lm.device, exact=run.rows.objective.exact)
        ends = []
        with torch.no_grad():
            for a in (mu, -mu):
                with zo.perturbed(run.optimizer.tuned, u, a):
                    ends.append(float(mean_loss(run.rows.objective, run.lm.score(batch), batch, [example])))
        expected = (ends[0] - ends[1]) / (2 * mu) * run.rows.objective.weight(example) / total
        assert c == pytest.approx(expected, rel=bound, abs=2e-5)
    assert estimate.num_forwards == (1 if made.method == "forward_grad" else 2)


def test_runs_write_ledgers_that_replay_and_resume(config, zotune, tmp_path):
    options = {"tuning": "lora", "rank": 1, "directions_per_batch": "auto", "gradient_accumulation_steps": 2}
    train(config(**options, max_steps=3, output_dir=tmp_path / "part"))
    train(config(**options, max_steps=5, output_dir=tmp_path / "part", resume=True))
    train(config(**options, max_steps=5, output_dir=tmp_path / "whole"))
    ledgers = [read(tmp_path / name / "ledger.zol") for name in ("part", "whole")]
    assert list(ledgers[0]) == list(ledgers[1])
    assert isinstance(ledgers[0].header.layout, FreeLayout)
    assert {(len(record.coefficients), record.num_forwards) for record in ledgers[0]} == {(4, 4)}
    assert zotune("ledger", "verify", tmp_path / "whole").code == 0
    shown = zotune("ledger", "show", tmp_path / "whole", "--json")
    assert shown.code == 0 and '"steps": 5' in shown.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"directions_per_batch": 99}, "a step reads 4 examples"),
        ({"directions_per_batch": 0}, "equal to 1"),
        ({"directions_per_batch": "each"}, "auto"),
        ({"directions_per_batch": 4, "method": "fzoo"}, "directions_per_batch has no effect here"),
        ({"directions_per_batch": 4, "method": "fo_sgd"}, "directions_per_batch has no effect here"),
        ({"directions_per_batch": 4, "hybrid_layers": 1}, "no hybrid"),
        ({"directions_per_batch": 4, "flipped": True, "rank": 1}, "two kinds"),
        ({"flipped": True}, "it needs directions_per_batch"),
        ({"directions_per_batch": 4, "objective": "f1"}, "generates text"),
        ({"directions_per_batch": 4, "tuning": "prefix"}, "virtual tokens"),
    ],
    ids=repr,
)
def test_what_does_not_go_together_is_refused(config, options, said):
    with pytest.raises(ValueError, match=said):
        config(**options)


def test_a_model_whose_rows_are_not_known_to_be_alone_is_refused(short, zotune):
    options = ("--directions-per-batch", 4, "--verbalizer", "yes", "Yes", "no", "No")
    result = zotune(*short(*options, model="random:roberta-tiny"))
    assert result.code == 2
    assert "needs a causal language model" in result.err
