"""Learning rates and μ that have worked, by what is tuned and by which method.

A step of a zeroth-order method has the length of all its random directions, so the learning rate that works falls with
the number d of tuned parameters and rises with the number q of queries. The rates that searches on held-out rows chose
follow η = K (d (1 - sparsity) / q)^-0.7 for each tuning scheme, over five orders of magnitude of d. These are the rates
of the benchmark on the built-in model (`benchmarks/results/bench`: LoRA 1e-2 at d = 13,000, prefix 0.1 at 58,000,
prompt 1e-2 at 5,800, full 3e-4 at 3.5 million) and those of MeZO on OPT-13B (Malladi et al., 2023: LoRA 1e-4 at
6.6 million, prefix 1e-2 at 2 million, full 1e-6 at 13 billion). First-order rates depend less on d.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from zotune.llm.config.method import FIRST_ORDER, MethodOptions, default_mu

# K of each tuning scheme. A scale of a packed base moves a block.
_ZEROTH_ORDER = {"full": 12.0, "scales": 0.015, "lora": 7.0, "prefix": 230.0, "prompt": 4.0}
_EXPONENT = 0.7
# Steps of momentum 0.9 are ten times as long; the other methods' rates in the benchmark are those of ZO-SGD.
_OF_METHOD = {"zo_sgd_mmt": 0.1}
# Steps of these methods have a length that does not depend on the slope: FZOO's falls with d as published (5e-5 at 13
# billion numbers), the others' are published for whole models.
_FZOO, _FZOO_EXPONENT, _FZOO_QUERIES = 0.12, 1 / 3, 8
_OF_MATRICES = {"zo_muon": 1e-2, "mopi": 1e-2}
# Directions whose entries are scaled by what they multiply allow longer steps (searches on the built-in model's norms).
_OF_SCALE = {"inputs": 10.0}
# The exponents of first-order methods, and K of each tuning scheme.
_FIRST_ORDER = {"fo_adam": 0.5, "fo_sgd": 0.35}
_ADAM = {"full": 0.8, "scales": 0.001, "lora": 1.2, "prefix": 8.0, "prompt": 2.3}
_SGD = {"full": 5.9, "scales": 0.007, "lora": 2.8, "prefix": 28.0, "prompt": 2.8}
# Schemes whose rates are those of another one: parts of the model's weights, and other adapters than LoRA.
_AS = dict.fromkeys(("head", "norms", "biases"), "full")
_AS |= dict.fromkeys(("lora_fa", "lora_xs", "vera", "ia3", "peft"), "lora")
# Factors around the default within which searches and published grids found working values.
_BELOW, _ABOVE = 100.0, 10.0
# Below this μ, rounding of half-precision weights makes probes noisy.
_SMALLEST_HALF_MU = 1e-4


class Range(NamedTuple):
    """The range of a hyper-parameter that has worked."""

    low: float
    high: float

    def side_of(self, value: float) -> Literal["below", "above"] | None:
        """Return on which side a value lies outside; None inside."""
        return "below" if value < self.low else "above" if value > self.high else None


def default_learning_rate(options: MethodOptions, num_tuned: int) -> float:
    """Return the learning rate to begin with, to one digit.

    Args:
        options: tuning scheme, method, number of queries and sparsity.
        num_tuned: number d of tuned parameters.

    >>> from zotune.llm.config.run import TrainConfig
    >>> default_learning_rate(TrainConfig(task="sst2", tuning="full"), 13_000_000_000)
    1e-06
    >>> default_learning_rate(TrainConfig(task="sst2", tuning="lora"), 13_000)
    0.009
    """
    d = max(1, num_tuned)
    if options.method in FIRST_ORDER:
        scales = _ADAM if options.method == "fo_adam" else _SGD
        return _one_digit(scales[_kind(options)] * d ** -_FIRST_ORDER[options.method])
    if options.method == "randopt":
        return options.mu  # a step lands on the mean of the best points
    if options.method == "fzoo":
        return _one_digit(_FZOO * (d * (1 - options.sparsity)) ** -_FZOO_EXPONENT)
    if options.method == "grzo":  # its steps are η/2μ√B long in each number, those of FZOO η/√N
        rows = getattr(options, "per_device_train_batch_size", 16) * getattr(options, "gradient_accumulation_steps", 1)
        return _one_digit(2 * options.mu * math.sqrt(rows / _FZOO_QUERIES) * _FZOO * d**-_FZOO_EXPONENT)
    if options.method in _OF_MATRICES:
        return _OF_MATRICES[options.method]
    effective = max(1.0, d * (1 - options.sparsity) / options.num_queries)
    factor = _OF_METHOD.get(options.method, 1.0) * _OF_SCALE.get(getattr(options, "direction_scale", "equal"), 1.0)
    return _one_digit(factor * _ZEROTH_ORDER[_kind(options)] * effective**-_EXPONENT)


def initial_learning_rate(options: MethodOptions, num_tuned: int) -> float:
    """Return the learning rate of the options, or the default one if they leave it open."""
    given = options.learning_rate
    return given if isinstance(given, float) else default_learning_rate(options, num_tuned)


def learning_rate_range(options: MethodOptions, num_tuned: int) -> Range:
    """Return the range of learning rates that have worked."""
    default = default_learning_rate(options, num_tuned)
    return Range(_one_digit(default / _BELOW), _one_digit(default * _ABOVE))


def mu_range(options: MethodOptions, *, half_precision: bool) -> Range:
    """Return the range of μ that has worked; `half_precision` is about the tuned weights."""
    default = default_mu(_tuning(options))
    low = default / _BELOW
    return Range(_one_digit(max(low, _SMALLEST_HALF_MU) if half_precision else low), _one_digit(default * _ABOVE))


def warnings(
    options: MethodOptions, num_tuned: int, *, half_precision: bool, search: str = ", or give --learning-rate auto"
) -> list[str]:
    """Return a sentence for each hyper-parameter outside the range that has worked.

    Args:
        options: the options of a run.
        num_tuned: number of tuned parameters.
        half_precision: whether tuned weights have 16 bits.
        search: how a rate can be searched there, as the end of a sentence.
    """
    found, tuning = [], _tuning(options)
    rate = initial_learning_rate(options, num_tuned)
    rates, what = learning_rate_range(options, num_tuned), f"{options.method} on {num_tuned:,} parameters"
    side = rates.side_of(rate) if rate > 0 else None
    if side is not None:
        effect = "learns hardly anything" if side == "below" else "usually raises the loss within a hundred steps"
        found.append(
            f"the learning rate {rate:g} is {side} the range {rates.low:g} to {rates.high:g} in which {what} (tuning: "
            f"{tuning}) has worked, and {effect}. Begin with "
            f"{default_learning_rate(options, num_tuned):g}{search}"
        )
    mus = mu_range(options, half_precision=half_precision)
    side = mus.side_of(options.mu) if options.method not in (*FIRST_ORDER, "forward_grad") else None
    if side is not None:
        effect = "makes rounding errors of the difference of two losses" if side == "below" else "is no longer a slope"
        found.append(
            f"mu {options.mu:g} is {side} the range {mus.low:g} to {mus.high:g} that has worked with tuning: "
            f"{tuning}, and {effect}. Begin with {default_mu(_tuning(options)):g}"
        )
    return found


def _tuning(options: MethodOptions) -> str:
    return str(getattr(options, "tuning", "full"))


def _kind(options: MethodOptions) -> str:
    """The tuning scheme whose rates count."""
    return _AS.get(_tuning(options), _tuning(options))


def _one_digit(value: float) -> float:
    return float(f"{value:.0e}")
