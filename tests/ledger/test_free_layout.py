"""Records of variable length: what a step holds comes back, damage is found, and steps are replayed from them."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import zotune as zo
from zotune.errors import UsageError
from zotune.estimate.estimate import GradientEstimate, averaged
from zotune.ledger import FreeLayout, Header, LedgerError, LedgerWriter, StepRecord, files, read
from zotune.ledger.files import DamagedLedgerError, parse
from zotune.ledger.replay import header_of, layout_of, record_to, replay
from zotune.ledger.stream import Trace

LAYOUT = FreeLayout(num_estimates=2, num_groups=1)


def records(count, seed=0):
    """Steps of different numbers of coefficients and scalars, of which some left an estimate out."""
    chance = random.Random(seed)

    def numbers(n):
        return tuple(float(np.float32(chance.gauss(0, 1))) for _ in range(n))

    for step in range(count):
        terms, scalars = 2 * chance.randrange(1, 5), 2 * chance.randrange(3)
        scales = (1.0, chance.choice([0.0, -1.0, 1.0]))
        yield StepRecord(
            step, *numbers(1), numbers(1), scales, numbers(terms), chance.randrange(1 << 24), numbers(scalars)
        )


def bytes_of(steps, layout=LAYOUT, **method):
    header = Header(layout, {"seed": 1, **method}, []).to_bytes()
    return header + b"".join(layout.pack(record, int.from_bytes(header[16:20], "little")) for record in steps)


@pytest.mark.parametrize("precision", ["f4", "f8"])
def test_what_is_written_comes_back(tmp_path, precision):
    layout = FreeLayout(2, 1, precision)
    steps = list(records(30))
    with LedgerWriter.create(tmp_path / "a.zol", Header(layout, {"seed": 1}, [])) as writer:
        for record in steps[:20]:
            writer.append(record)
    writer, ledger = LedgerWriter.resume(tmp_path / "a.zol")
    with writer:
        assert (list(ledger), len(ledger), ledger[-1], ledger[7]) == (steps[:20], 20, steps[19], steps[7])
        for record in steps[20:]:
            writer.append(record)
    whole = read(tmp_path / "a.zol")
    assert list(whole) == steps
    assert whole.content == bytes_of(steps, layout)
    first = whole.first(9)
    assert first.to_bytes() == bytes_of(steps[:9], layout)
    assert first.mark == read(tmp_path / "a.zol").first(9).mark != whole.mark == writer.mark
    assert list(parse(files.with_about(whole, {"note": 1}), "x")) == steps


def test_a_torn_tail_is_cut_and_damage_before_a_good_record_is_refused():
    steps = list(records(12))
    whole = bytes_of(steps)
    last = len(whole) - len(bytes_of(steps[:-1]))
    chance = random.Random(1)
    for cut in (1, last - 1):
        assert list(parse(whole[:-cut], "x")) == steps[:-1]
    start = len(bytes_of([]))
    for _ in range(60):
        at, size = chance.randrange(start, len(whole) - last - 40), chance.choice([1, 4, 31])
        lost, inserted = whole[:at] + whole[at + size :], whole[:at] + chance.randbytes(size) + whole[at:]
        flipped = whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :]
        for content in (lost, inserted, flipped):
            with pytest.raises(DamagedLedgerError) as error:
                parse(content, "x")
            intact = error.value.intact
            assert list(intact) == steps[: len(intact)]
            assert len(bytes_of(steps[: len(intact)])) <= at + size < len(whole)


def test_a_lost_or_repeated_record_is_damage():
    steps = list(records(6))
    whole, ends = bytes_of(steps), [len(bytes_of(steps[:i])) for i in range(7)]
    for content in (whole[: ends[2]] + whole[ends[3] :], whole[: ends[3]] + whole[ends[2] :]):
        with pytest.raises(DamagedLedgerError) as error:
            parse(content, "x")
        assert list(error.value.intact) == steps[: len(error.value.intact)]
        assert len(error.value.intact) in (2, 3)


def test_a_record_of_another_ledger_is_no_good_one():
    steps = list(records(3))
    other = bytes_of(steps, block="another header")
    start = len(bytes_of([]))
    assert len(parse(bytes_of([]) + other[-(len(bytes_of(steps)) - start) :], "x")) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"coefficients": (1.0, math.nan, 1.0, 1.0)}, "a coefficient is not finite"),
        ({"scalars": (1.0, math.inf)}, "a scalar is not finite"),
        ({"learning_rates": (math.nan,)}, "a learning rate is not finite"),
        ({"coefficients": (1.0,)}, "no equal shares"),
        ({"scales": (1.0, 0.5)}, "once, not at all or backwards"),
        ({"learning_rates": (1.0, 1.0)}, "2 parameter groups"),
    ],
)
def test_steps_that_cannot_be_are_refused(tmp_path, change, said):
    sound = {"coefficients": (1.0, 2.0), "scales": (1.0, 1.0), "learning_rates": (0.1,), "scalars": ()}
    with LedgerWriter.create(tmp_path / "a.zol", Header(LAYOUT, {"seed": 1}, [])) as writer:
        with pytest.raises(LedgerError, match=said):
            writer.append(StepRecord(0, 0.5, num_forwards=2, **{**sound, **change}))
        left_out = {"coefficients": (1.0, math.nan), "scales": (1.0, math.nan), "scalars": (1.0, math.nan)}
        writer.append(StepRecord(0, 0.5, num_forwards=2, **{**sound, **left_out}))
    assert read(tmp_path / "a.zol")[0].is_skipped


class Drifting:
    """An estimator whose number of directions and rate follow the curvatures that it has seen."""

    has_scalars = True

    def num_groups(self, learned, closure):
        return 1 if learned is None else 1 + int(learned) % 3

    def rate(self, learned, closure):
        return 1.0 if learned is None else 0.5

    def observed(self, learned, estimate):
        return (learned or 0.0) + sum(estimate.scalars)

    def __call__(self, closure, tuned, directions):
        values = []
        for u in directions:
            for a in (1e-3, -1e-3):
                with torch.no_grad(), zo.perturbed(tuned, u, a):
                    values.append(float(closure()))
        ups, downs = values[::2], values[1::2]
        slopes = [(p - m) / 2e-3 for p, m in zip(ups, downs, strict=True)]
        terms = averaged(slopes, directions)
        return GradientEstimate(sum(values) / len(values), terms, len(values), scalars=tuple(map(abs, slopes)))


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def optimizer_of(model, *, blocks=False, **options):
    if blocks:
        options |= {"blocks": zo.blocks_by_size(model, 6), "block_order": "sequential"}
    return zo.ZerothOrder(model, 0.05, estimator=Drifting(), num_queries=2, **options)


@pytest.mark.parametrize("blocks", [False, True])
def test_steps_of_changing_size_are_replayed_and_resumed_to_the_bit(tmp_path, blocks):
    model, x = model_of(), torch.randn(5, 3, generator=torch.Generator().manual_seed(1))

    def closure_of(model):
        return lambda: model(x).square().mean()

    opt = optimizer_of(model, blocks=blocks)
    with LedgerWriter.create(tmp_path / "a.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        for _ in range(6):
            opt.step(closure_of(model))
        state = opt.state_dict()
        for _ in range(6):
            opt.step(closure_of(model))
    ledger = read(tmp_path / "a.zol")
    assert len({len(record.coefficients) for record in ledger}) > 1
    assert {record.learning_rates[0] for record in ledger} == {float(np.float32(rate)) for rate in (0.05, 0.025)}
    again = replay(optimizer_of(model_of(), blocks=blocks), ledger)
    middle = replay(optimizer_of(model_of(), blocks=blocks), ledger.first(6))
    resumed = optimizer_of(middle.tuned.model, blocks=blocks)
    resumed.load_state_dict(state)
    assert resumed.state_dict()["zeroth_order"] == middle.state_dict()["zeroth_order"] == state["zeroth_order"]
    for _ in range(6):
        resumed.step(closure_of(middle.tuned.model))
    for same in (again, resumed):
        for p, q in zip(same.tuned.model.parameters(), model.parameters(), strict=True):
            assert torch.equal(p, q)
    assert again.state_dict()["zeroth_order"] == opt.state_dict()["zeroth_order"]
    weight = model_of().weight.detach().clone().view(-1)
    Trace(optimizer_of(model_of(), blocks=blocks), list(ledger)).apply("weight", weight, size=4)
    assert torch.equal(weight.view(2, 3), model.weight)


def test_an_error_leaves_what_was_learned_as_it_was():
    model = model_of()
    opt = optimizer_of(model)
    opt.step(lambda: model.weight.square().sum() + model.bias.sum())
    before = opt.state_dict()["zeroth_order"]

    def fails(record):
        raise OSError

    opt.on_step = fails
    with pytest.raises(OSError):
        opt.step(lambda: model.weight.square().sum() + model.bias.sum())
    assert opt.state_dict()["zeroth_order"] == before


def test_a_record_of_other_counts_is_refused():
    opt = optimizer_of(model_of())
    for count in (1, 3, 0):
        with pytest.raises(UsageError, match="2 or a multiple of it for each of 1 blocks"):
            opt.replay_step(StepRecord(0, 0.5, (0.1,), (1.0,), (0.5,) * count, 2))


def test_only_runs_that_need_it_have_records_of_variable_length():
    assert isinstance(layout_of(optimizer_of(model_of())), FreeLayout)
    assert not isinstance(layout_of(zo.zo_sgd(model_of(), lr=0.1, num_queries=3)), FreeLayout)
