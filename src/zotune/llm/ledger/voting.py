"""The best points of a randopt run as an ensemble that votes, made from the run's ledger: k seeds and a distance μ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zotune.directions.direction import Direction
from zotune.errors import UsageError
from zotune.estimate.objective import probing
from zotune.estimate.perturb import perturbed
from zotune.ledger import Ledger
from zotune.llm.checkpoints.adapter_source import folder_of_run
from zotune.llm.config.run import EvalConfig, ModelOptions
from zotune.llm.ledger.rebuild import RebuiltModel, config_of, find_ledger, rebuild_in_memory
from zotune.llm.scoring.accuracy import Evaluation, Measure
from zotune.llm.scoring.voting import elected
from zotune.llm.training import evaluation
from zotune.llm.training.evaluation import Opened, TaskEvaluation
from zotune.messages import say


def evaluate(config: EvalConfig) -> tuple[dict[str, TaskEvaluation], dict[str, Any]]:
    """As `zotune.llm.training.evaluation.evaluate`; with `vote` the run's best points answer, not its saved weights.

    Raises:
        UsageError: as there, or the model is no randopt run whose ledger has best points.
    """
    if not config.vote:
        return evaluation.evaluate(config)
    _check(config)
    return evaluation.evaluate(config, open_voters)


def _check(config: EvalConfig) -> None:
    """Refuse options of the model beside `vote`, which takes the model of the run as it was trained."""
    if config.compute_metrics:
        raise UsageError("compute_metrics judges what one model answers, --vote asks several; leave one out.")
    fields = EvalConfig.model_fields
    others = ({*ModelOptions.model_fields} - {"model", "device", "accept_terms"}) | {"shard"}
    given = sorted(name for name in others if getattr(config, name) != fields[name].default)
    if given:
        raise UsageError(f"--vote makes the model again from its ledger, as it was trained; leave out {given[0]}.")


def open_voters(config: EvalConfig) -> Opened:
    """The model as it was before the last step of a run that kept points, and the vote of these points x + μuᵢ.

    Raises:
        UsageError: the model is no randopt run, or none of its steps kept a point.
    """
    ledger = find_ledger(folder_of_run(config.model))
    run = config_of(ledger, device=config.device)
    if run.method != "randopt":
        raise UsageError(
            f"--vote lets the best points of a randopt run vote, but {config.model} was tuned by {run.method}. Leave "
            "it out, or tune with --method randopt."
        )
    if run.block_order == "sequential":
        raise UsageError(
            f"the points of {config.model} lie around other weights in each block (block_order: sequential), so they "
            "are no ensemble. Leave --vote out, or tune with block_order: joint."
        )
    step = _last_with_points(ledger)
    if step is None:
        raise UsageError(
            f"no step of {config.model} kept a point, so there is none to vote: no point was better than the weights "
            "themselves. Take more points (--num-queries), another --mu, or keep the best in any case "
            "(--no-only-better)."
        )
    rebuilt = rebuild_in_memory(ledger.first(step), run)
    directions = rebuilt.optimizer.directions()
    voters = [u for c, u in zip(ledger[step].coefficients, directions, strict=True) if c]
    say(f"the {len(voters)} best points of step {step + 1} vote, around the weights before that step")
    return rebuilt.lm, _vote_of(rebuilt, voters, run.mu)


def _last_with_points(ledger: Ledger) -> int | None:
    """The last step whose record has points that were kept."""
    return max((r.step for r in ledger if not r.is_skipped and any(r.coefficients)), default=None)


def _vote_of(rebuilt: RebuiltModel, voters: Sequence[Direction], mu: float) -> Callable[[Measure], Measure]:
    tuned = rebuilt.optimizer.tuned

    def of(measure: Measure) -> Measure:
        def voted(*args: Any, **kwargs: Any) -> Evaluation:
            found = []
            with probing(tuned.model):
                for u in voters:
                    with perturbed(tuned, u, mu):
                        found.append(measure(*args, **kwargs))
            return elected(found, args[1])

        return voted

    return of
