"""Weights are a function of (base model, ledger): every run is rebuilt to the bit, and nothing damaged is believed."""

import json
import math
import os
import random
import re
import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zotune as zo
from ledger_runs import IN_SUBSPACES, LATER, METHODS, bits_of, loss_of, network, run
from zotune.errors import RunError, UsageError
from zotune.ledger import Header, Layout, LedgerError, LedgerWriter, StepRecord, read
from zotune.ledger.files import parse
from zotune.ledger.format import checksum
from zotune.ledger.replay import header_of, record_to, replay

MAKES = METHODS | LATER | IN_SUBSPACES
each_method = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(bits_of(one), bits_of(other), strict=True))


def states_of(opt):
    return {(t.name, key): value for t in opt.tuned for key, value in opt.state[t.parameter].items()}


def assert_same_optimizer(one, other):
    assert same_bits(one.tuned.model, other.tuned.model)
    ours, theirs = states_of(one), states_of(other)
    assert ours.keys() == theirs.keys()
    for key, v in ours.items():
        assert torch.equal(v, theirs[key]) if isinstance(v, torch.Tensor) else v == theirs[key]
    assert (one.num_steps, one.num_skipped, one.num_forwards) == (
        other.num_steps,
        other.num_skipped,
        other.num_forwards,
    )


@pytest.mark.sample(9)
@each_method
@each_dtype
@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
def test_replay_gives_the_weights_and_the_state_of_the_run(make, dtype, sampler, tmp_path):
    opt, base = run(make, tmp_path / "a.zol", 8, dtype, bad=(2, 5), sampler=sampler)
    assert not same_bits(opt.tuned.model, base)
    again = make(base, seed=3, sampler=sampler)
    seen = []
    replay(again, read(tmp_path / "a.zol"), each=seen.append)
    assert [r.step for r in seen] == list(range(8))
    assert [r.is_skipped for r in seen] == [step in (2, 5) for step in range(8)]
    assert_same_optimizer(opt, again)


@pytest.mark.parametrize("rounding", ["master", "nearest", "stochastic"])
@pytest.mark.parametrize("method", ["sgd", "momentum", "zo_muon", "lozo, momentum, decay"])
def test_every_rounding_is_replayed(rounding, method, tmp_path):
    opt, base = run(MAKES[method], tmp_path / "a.zol", 8, torch.bfloat16, rounding=rounding)
    assert_same_optimizer(opt, replay(MAKES[method](base, seed=3, rounding=rounding), read(tmp_path / "a.zol")))


@pytest.mark.parametrize("mask", ["random", "magnitude"])
@pytest.mark.parametrize("group", ["global", "layer"])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("method", ["sgd", "blocks one by one, conservative", "momentum"])
def test_masks_are_made_again(mask, group, interval, method, tmp_path):
    sampler = zo.sparse(zo.gaussian, 0.4, mask=mask, group=group, interval=interval)
    opt, base = run(METHODS[method], tmp_path / "a.zol", 8, bad=(0, 3), sampler=sampler)
    assert_same_optimizer(opt, replay(METHODS[method](base, seed=3, sampler=sampler), read(tmp_path / "a.zol")))


@pytest.mark.sample(9)
@each_method
def test_a_run_that_goes_on_after_a_replay_ends_with_the_same_bits(make, tmp_path):
    whole, base = run(make, tmp_path / "a.zol", 8)
    ledger = read(tmp_path / "a.zol").first(5)
    (tmp_path / "b.zol").write_bytes(ledger.to_bytes())
    opt = replay(make(base, seed=3), ledger)
    writer, _ = LedgerWriter.resume(tmp_path / "b.zol")
    with writer:
        record_to(writer, opt)
        for step in range(5, 8):
            before = [group["lr"] for group in opt.param_groups]
            for group in opt.param_groups:
                group["lr"] *= (1 + math.cos(0.3 * step)) / 2
            opt.step(loss_of(base))
            for group, rate in zip(opt.param_groups, before, strict=True):
                group["lr"] = rate
    assert same_bits(whole.tuned.model, base)
    assert states_of(whole).keys() == states_of(opt).keys()
    ours, theirs = read(tmp_path / "a.zol"), read(tmp_path / "b.zol")
    passes = [(r.num_forwards, s.num_forwards) for r, s in zip(ours, theirs, strict=True)]
    if "CheckedForwardGradient" not in str(ours.header.method):
        assert all(a == b for a, b in passes)
        assert (tmp_path / "a.zol").read_bytes() == (tmp_path / "b.zol").read_bytes()


def test_a_record_takes_twenty_bytes_and_four_more_a_query():
    assert [Layout(1, 1, q).record.itemsize for q in (1, 2, 5)] == [20, 24, 36]


def test_a_record_is_laid_out_as_documented(tmp_path):
    opt, _ = run(METHODS["sgd"], tmp_path / "a.zol", 3, bad=(1,))
    content = (tmp_path / "a.zol").read_bytes()
    assert content[:8] == b"ZOLEDGER"
    version, n, crc = struct.unpack_from("<3I", content, 8)
    assert version == 1
    assert crc == zlib.crc32(content[20 : 20 + n], zlib.crc32(content[:16]))
    records = [content[20 + n + 20 * i :][:20] for i in range(3)]
    assert len(content) == 20 + n + 60
    for i, record in enumerate(records):
        assert struct.unpack_from("<I", record)[0] == zlib.crc32(record[4:], zlib.crc32(struct.pack("<Q", i), crc))
        passes, scale = int.from_bytes(record[4:7], "little"), record[7]
        loss, rate, c = struct.unpack_from("<3f", record, 8)
        assert passes == 2
        assert scale == (2 if i == 1 else 1)
        assert math.isnan(loss) == math.isnan(c) == (i == 1)
        assert rate == pytest.approx(2e-2 * (1 + math.cos(0.3 * i)) / 2, rel=1e-7)
    assert opt.num_skipped == 1


@pytest.mark.parametrize("what", ["base", "seed", "rate of decay", "sampler", "dtype", "shape"])
def test_a_ledger_is_refused_by_what_it_does_not_belong_to(what, tmp_path):
    _, base = run(METHODS["sgd"], tmp_path / "a.zol")
    ledger = read(tmp_path / "a.zol")
    if what == "base":
        with torch.no_grad():
            base[0].weight[0, 0] += 1e-7
    base = base.double() if what == "dtype" else base
    base = nn.Sequential(nn.Linear(5, 7)) if what == "shape" else base
    options = {"seed": {"seed": 4}, "rate of decay": {"weight_decay": 0.1}, "sampler": {"sampler": zo.gaussian}}
    opt = METHODS["sgd"](base, **{"seed": 3, **options.get(what, {})})
    before = bits_of(base)
    with pytest.raises(LedgerError, match=r"another base model|is of a run with"):
        replay(opt, ledger)
    assert all(torch.equal(a, b) for a, b in zip(before, bits_of(base), strict=True))


def test_estimates_that_are_not_of_the_steps_directions_are_not_recorded(tmp_path):
    model = network()
    opt = zo.zo_sgd(model, lr=0.1)
    with LedgerWriter.create(tmp_path / "a.zol", header_of(opt)) as writer:
        record_to(writer, opt)
        foreign = zo.GradientEstimate(0.5, ((1.0, zo.Direction(7)),), 2)
        before = bits_of(model)
        with pytest.raises(UsageError, match="own directions"):
            opt.apply(foreign)
        assert all(torch.equal(a, b) for a, b in zip(before, bits_of(model), strict=True))
        opt.apply(opt.estimate(loss_of(model)))
    assert len(read(tmp_path / "a.zol")) == 1


def test_a_torn_or_damaged_tail_is_cut_and_counted(tmp_path):
    run(METHODS["sgd"], tmp_path / "a.zol", 4)
    content = (tmp_path / "a.zol").read_bytes()
    whole = read(tmp_path / "a.zol")
    start = len(content) - 80
    for cut in range(80):
        (tmp_path / "b.zol").write_bytes(content[: len(content) - cut])
        ledger = read(tmp_path / "b.zol")
        assert len(ledger) == (80 - cut) // 20
        assert ledger.cut_bytes == (80 - cut) % 20
        assert ledger.to_bytes() == content[: start + 20 * len(ledger)]
        assert list(map(repr, ledger)) == list(map(repr, list(whole)[: len(ledger)]))
    for bit in range(8 * 20):
        damaged = bytearray(content)
        damaged[len(content) - 20 + bit // 8] ^= 1 << bit % 8
        (tmp_path / "b.zol").write_bytes(damaged)
        ledger = read(tmp_path / "b.zol")
        assert (len(ledger), ledger.cut_bytes) == (3, 20)
    torn = (tmp_path / "b.zol").read_bytes()
    writer, ledger = LedgerWriter.resume(tmp_path / "b.zol")
    writer.close()
    assert (tmp_path / "b.zol").read_bytes() == torn
    writer, ledger = LedgerWriter.resume(tmp_path / "b.zol")
    with writer:
        writer.append(whole[3])
    assert (tmp_path / "b.zol").read_bytes() == content
    (tmp_path / "b.zol").write_bytes(torn)
    writer, ledger = LedgerWriter.resume(tmp_path / "b.zol")
    with writer:
        writer.cut_tail()
    assert (tmp_path / "b.zol").read_bytes() == content[:-20]
    (tmp_path / "b.zol").write_bytes(content[:-20] + bytes(1000))
    assert len(read(tmp_path / "b.zol")) == 3


def test_damage_anywhere_else_is_refused_and_the_file_left_alone(tmp_path):
    run(METHODS["sgd"], tmp_path / "a.zol", 4)
    content = (tmp_path / "a.zol").read_bytes()
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content) - 20)] ^= 1 << chance.randrange(8)
        (tmp_path / "b.zol").write_bytes(damaged)
        for attempt in (read, LedgerWriter.resume):
            with pytest.raises(LedgerError, match=r"damaged|no ledger|version|ends within its header"):
                attempt(tmp_path / "b.zol")
        assert (tmp_path / "b.zol").read_bytes() == damaged
    for size in range(len(content) - 80):
        (tmp_path / "b.zol").write_bytes(content[:size])
        with pytest.raises(LedgerError, match=r"no ledger|ends within its header"):
            read(tmp_path / "b.zol")


def test_records_of_another_place_or_ledger_are_no_good_ones(tmp_path):
    run(METHODS["sgd"], tmp_path / "a.zol", 4)
    run(METHODS["sgd"], tmp_path / "b.zol", 4, sampler=zo.gaussian)
    one, other = (tmp_path / "a.zol").read_bytes(), (tmp_path / "b.zol").read_bytes()
    (tmp_path / "c.zol").write_bytes(one[:-40] + one[-60:-40])
    assert len(read(tmp_path / "c.zol")) == 2
    (tmp_path / "c.zol").write_bytes(one[:-80] + other[-80:])
    assert len(read(tmp_path / "c.zol")) == 0


def test_there_is_one_writer_at_a_time(tmp_path):
    run(METHODS["sgd"], tmp_path / "a.zol", 1)
    writer, _ = LedgerWriter.resume(tmp_path / "a.zol")
    with pytest.raises(LedgerError, match="another process is writing"):
        LedgerWriter.resume(tmp_path / "a.zol")
    with pytest.raises(LedgerError, match="there already"):
        LedgerWriter.create(tmp_path / "a.zol", writer.header)
    writer.close()
    LedgerWriter.resume(tmp_path / "a.zol")[0].close()


def test_steps_out_of_order_or_of_another_shape_are_not_written(tmp_path):
    run(METHODS["sgd"], tmp_path / "a.zol", 2)
    writer, ledger = LedgerWriter.resume(tmp_path / "a.zol")
    with writer:
        for record, why in (
            (ledger[0], "next step is number 2"),
            (StepRecord(2, 0.0, (0.1,), (1.0,), (1.0, 2.0), 2), "coefficients"),
            (StepRecord(2, 0.0, (0.1,), (0.5,), (1.0,), 2), "not \\[0.5\\] times"),
        ):
            with pytest.raises(LedgerError, match=why):
                writer.append(record)
    assert len(read(tmp_path / "a.zol")) == 2


def test_a_file_that_is_gone_or_full_ends_the_run_with_whole_records(tmp_path, monkeypatch):
    run(METHODS["sgd"], tmp_path / "a.zol", 2)
    monkeypatch.setattr("zotune.ledger.files._SECONDS_BETWEEN_SYNCS", 0)
    writer, ledger = LedgerWriter.resume(tmp_path / "a.zol")
    real = os.write

    def full(file, content):
        if len(content) == 20:
            return real(file, content[:7])
        raise OSError(28, "No space left on device")

    with writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(RunError, match=r"step 3 could not be written.*No space left"):
                writer.append(StepRecord(2, 0.0, (0.1,), (1.0,), (1.0,), 2))
        assert (tmp_path / "a.zol").read_bytes() == ledger.to_bytes()
        writer.append(StepRecord(2, 0.0, (0.1,), (1.0,), (1.0,), 2))
        assert len(read(tmp_path / "a.zol")) == 3
        (tmp_path / "a.zol").unlink()
        with pytest.raises(RunError, match="removed"):
            writer.append(StepRecord(3, 0.0, (0.1,), (1.0,), (1.0,), 2))


def blocks_of_the_page():
    page = (Path(__file__).parents[2] / "docs/reference/ledger-format.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)


def test_the_example_of_the_page_runs():
    exec(compile(blocks_of_the_page()[0], "ledger-format.md", "exec"), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
@pytest.mark.parametrize("method", ["sgd", "sgd, two queries, one-sided", "conservative"])
def test_the_reader_of_the_page_rebuilds_weights_from_the_specification_alone(dtype, sampler, method, tmp_path):
    opt, base = run(METHODS[method], tmp_path / "a.zol", 8, dtype, bad=(3,), sampler=sampler)
    names: dict = {}
    exec(compile(blocks_of_the_page()[1], "ledger-format.md", "exec"), names)
    header, records = names["read_ledger"]((tmp_path / "a.zol").read_bytes())
    assert len(records) == 8

    def numbers(p):
        return (p.detach().view(torch.uint16) if dtype == torch.bfloat16 else p.detach()).numpy().copy()

    weights = {name: numbers(p) for name, p in base.named_parameters()}
    names["rebuild"](weights, header, records)
    for name, p in opt.tuned.model.named_parameters():
        assert (weights[name] == numbers(p)).all(), name


headers = st.builds(
    Layout,
    num_estimates=st.integers(1, 6),
    num_groups=st.integers(1, 3),
    num_coefficients=st.integers(1, 9),
    precision=st.sampled_from(["f4", "f8"]),
)
numbers = st.floats(width=32)
finite_numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def a_record(draw, layout, step):
    """A record as a step may leave it: finite, unless its estimates were left out."""
    scales = tuple(draw(st.sampled_from([1.0, 0.0, -1.0])) for _ in range(layout.num_estimates))
    if draw(st.booleans()):
        scales = (math.nan,) * layout.num_estimates
    coefficients = numbers if math.isnan(scales[0]) else finite_numbers
    return StepRecord(
        step,
        draw(numbers),
        tuple(draw(finite_numbers) for _ in range(layout.num_groups)),
        scales,
        tuple(draw(coefficients) for _ in range(layout.num_coefficients)),
        draw(st.integers(0, 2**24 - 1)),
    )


@settings(max_examples=int(os.environ.get("ZOTUNE_FUZZ", "60")), deadline=None)
@given(headers, st.data())
def test_whatever_is_written_is_read_and_whatever_is_damaged_is_cut_or_refused(layout, data):
    records = [data.draw(a_record(layout, step)) for step in range(data.draw(st.integers(0, 4)))]
    header = Header(
        layout, {"seed": data.draw(st.integers(0, 2**64 - 1))}, [], {"text": data.draw(st.text(max_size=9))}
    )
    content = bytearray(header.to_bytes())
    crc = int.from_bytes(content[16:20], "little")
    for record in records:
        row = layout.to_row(record)
        row["crc"] = checksum(row.tobytes(), record.step, crc)
        content += row.tobytes()
    ledger = parse(bytes(content), "x")
    assert ledger.header == header
    assert list(map(repr, ledger)) == list(map(repr, records))
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["flip", "cut", "add", "overwrite"]))
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if kind == "cut":
            del content[at:]
        elif kind == "add":
            content += data.draw(st.binary(max_size=60))
        elif content:
            content[at] = (
                content[at] ^ 1 << data.draw(st.integers(0, 7)) if kind == "flip" else data.draw(st.integers(0, 255))
            )
    try:
        found = parse(bytes(content), "x")
    except LedgerError as error:
        assert str(error)
        return
    assert found.header == header
    assert list(map(repr, found)) == list(map(repr, records))[: len(found)]


@settings(max_examples=int(os.environ.get("ZOTUNE_FUZZ", "60")), deadline=None)
@given(st.one_of(st.binary(max_size=300), st.recursive(st.none() | st.floats() | st.text(), st.lists)))
def test_bytes_that_are_no_ledger_are_refused_with_a_message(value):
    """Also those with a good checksum around a body that means nothing."""
    body = value if isinstance(value, bytes) else zlib.compress(json.dumps(value).encode())
    start = b"ZOLEDGER" + struct.pack("<2I", 1, len(body))
    whole = start + struct.pack("<I", zlib.crc32(body, zlib.crc32(start))) + body
    for content in (body, whole):
        with pytest.raises(LedgerError, match=r"no ledger|cannot be understood|ends within|version"):
            parse(content, "x")
