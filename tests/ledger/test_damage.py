"""What is lost in a ledger is told by what follows it: a torn tail may be cut, good records behind damage never are."""

import random
import threading
import time

import numpy as np
import pytest

from zotune.ledger import Header, Layout, LedgerError, LedgerWriter, StepRecord, files, format, read
from zotune.ledger.files import DamagedLedgerError, parse
from zotune.ledger.format import checksum


def written(layout, records, method=None):
    """The bytes of a ledger with good checksums, whatever its records are: rows, or numbers of rows that are sound."""
    content = Header(layout, {"seed": 1, **(method or {})}, []).to_bytes()
    crc = int.from_bytes(content[16:20], "little")
    for i, change in enumerate(records):
        row = np.zeros(1, layout.record)
        row["scales"][0, : layout.num_estimates] = 1
        row["numbers"] = 0.5 + i
        change(row)
        row["crc"] = checksum(row.tobytes(), i, crc)
        content += row.tobytes()
    return content


def sound(row):
    pass


LAYOUT = Layout(num_estimates=1, num_groups=1, num_coefficients=1)
SIZE, STEPS = 20, 40
WHOLE = written(LAYOUT, [sound] * STEPS)
START = len(WHOLE) - SIZE * STEPS


@pytest.mark.parametrize("lost", [1, 7, 20, 29, 60])
def test_bytes_lost_in_the_middle_are_no_torn_tail(lost):
    for at in range(START, len(WHOLE) - SIZE - lost, 29):
        with pytest.raises(DamagedLedgerError, match="damaged in the middle") as error:
            parse(WHOLE[:at] + WHOLE[at + lost :], "x")
        intact = error.value.intact
        # One more where the byte that took the place of a lost one is the same.
        assert (at - START) // SIZE <= len(intact) <= (at - START) // SIZE + 1
        assert intact.to_bytes() == WHOLE[: START + SIZE * len(intact)]
        assert f"--to-step {len(intact)}," in str(error.value)


def test_bytes_inserted_or_written_over_in_the_middle_are_no_torn_tail():
    chance = random.Random(0)
    for _ in range(40):
        at = chance.randrange(START, len(WHOLE) - SIZE)
        new = chance.randbytes(chance.choice([1, 5, 20, 333]))
        skipped = chance.choice([0, len(new)]) if at + len(new) < len(WHOLE) - SIZE else 0
        with pytest.raises(DamagedLedgerError) as error:
            parse(WHOLE[:at] + new + WHOLE[at + skipped :], "x")
        assert len(error.value.intact) <= (at - START) // SIZE + 1


def test_a_tail_without_a_good_record_is_torn():
    chance = random.Random(0)
    middle = START + SIZE * 20
    # Random bytes, zeros, a torn record, records of the same ledger that were written before, and of another one.
    other = written(LAYOUT, [sound] * STEPS, {"seed": 2})[-SIZE * 20 :]
    tails = [chance.randbytes(chance.randrange(4096)) for _ in range(20)]
    for tail in [*tails, bytes(999), WHOLE[middle : middle + 19], WHOLE[START : START + 200], other]:
        ledger = parse(WHOLE[:middle] + tail, "x")
        assert (len(ledger), ledger.cut_bytes) == (20, len(tail))


def test_a_damaged_file_is_left_as_it_is(tmp_path):
    path = tmp_path / "a.zol"
    path.write_bytes(WHOLE[:-90] + WHOLE[-89:])
    before = path.read_bytes()
    for attempt in (read, LedgerWriter.resume):
        with pytest.raises(DamagedLedgerError):
            attempt(path)
    assert path.read_bytes() == before


def test_no_byte_is_read_for_more_than_its_record(monkeypatch):
    seen, real = [], checksum

    def spy(row, index, crc):
        assert isinstance(row, memoryview)
        assert row.obj is WHOLE
        seen.append(len(row))
        return real(row, index, crc)

    monkeypatch.setattr(format, "checksum", spy)
    assert len(parse(WHOLE, "x")) == STEPS
    assert seen == [SIZE] * STEPS


def number(place, value):
    def change(row):
        row["numbers"][0, place] = value

    return change


def scale(place, code, then=sound):
    def change(row):
        row["scales"][0, place] = code
        then(row)

    return change


TWO = Layout(num_estimates=2, num_groups=1, num_coefficients=4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (number(2, np.nan), "a coefficient is not finite"),
        (number(5, -np.inf), "a coefficient is not finite"),
        (scale(0, 2, number(4, np.nan)), "a coefficient is not finite"),
        (number(1, np.inf), "a learning rate is not finite"),
        (scale(0, 2, number(1, np.nan)), "a learning rate is not finite"),
        (scale(1, 3), "a scale is none of"),
        (scale(0, -2), "a scale is none of"),
        (scale(3, 1), "a scale is none of"),
    ],
)
def test_records_that_no_step_can_have_are_refused_in_spite_of_good_checksums(change, said):
    with pytest.raises(LedgerError, match=f"step 3 of x was not written by zotune: {said}"):
        parse(written(TWO, [sound, sound, change, sound]), "x")


def test_what_was_left_out_need_not_be_finite():
    left_out = scale(1, 2, lambda row: (number(4, np.nan)(row), number(0, np.nan)(row)))
    ledger = parse(written(TWO, [sound, left_out]), "x")
    assert ledger[1].is_skipped
    assert [r.step for r in ledger] == [0, 1]


@pytest.mark.parametrize("rate", [np.inf, np.nan])
def test_such_records_are_not_written_either(tmp_path, rate):
    (tmp_path / "a.zol").write_bytes(WHOLE[: START + SIZE])
    writer, _ = LedgerWriter.resume(tmp_path / "a.zol")
    with writer, pytest.raises(LedgerError, match="step 2 cannot be recorded"):
        writer.append(StepRecord(1, 0.5, (0.1,), (1.0,), (rate,), 2))
    assert len(read(tmp_path / "a.zol")) == 1


@pytest.mark.parametrize(
    "layout", [{"num_coefficients": 3}, {"num_groups": 2}, {"num_estimates": 2}, {"num_coefficients": 1 << 20}]
)
def test_counts_unlike_those_of_the_method_are_refused(layout):
    method = {"blocks": [None], "groups": [{}], "num_queries": 1, "block_order": "joint"}
    assert len(parse(written(LAYOUT, [sound], method), "x")) == 1
    wrong = Layout(**{"num_estimates": 1, "num_groups": 1, "num_coefficients": 1, **layout})
    with pytest.raises(LedgerError, match="its records hold"):
        parse(written(wrong, [], method), "x")


@pytest.mark.parametrize(
    "tensor",
    [
        {"name": 1, "id": 1, "dtype": "float32", "shape": [1], "digest": ""},
        {"name": "a", "id": 1, "dtype": "float32", "shape": [-1], "digest": ""},
        {"name": "a", "id": 1, "dtype": "float32", "shape": "3", "digest": ""},
        {"name": "a", "id": 1, "dtype": "float32", "shape": [1]},
        "a",
    ],
)
def test_headers_without_a_meaning_are_refused(tensor):
    with pytest.raises(LedgerError, match=r"cannot be understood: .* is no (tensor|shape)"):
        parse(Header(LAYOUT, {"seed": 1}, [tensor]).to_bytes(), "x")
    for seed in (-1, 1 << 64, 1.0, True):
        with pytest.raises(LedgerError, match="has no seed"):
            parse(Header(LAYOUT, {"seed": seed}, []).to_bytes(), "x")


def test_a_record_that_nothing_follows_is_synced_soon(tmp_path, monkeypatch):
    import os

    synced, real = threading.Event(), os.fdatasync

    def sync(file):
        real(file)
        synced.set()

    monkeypatch.setattr(files, "_SECONDS_BETWEEN_SYNCS", 0.05)
    (tmp_path / "a.zol").write_bytes(WHOLE[: START + SIZE])
    writer, _ = LedgerWriter.resume(tmp_path / "a.zol")
    with writer:
        monkeypatch.setattr(os, "fdatasync", sync)
        writer.append(StepRecord(1, 0.5, (0.5,), (1.0,), (0.5,), 2))
        assert synced.wait(20)
        synced.clear()
        time.sleep(0.15)
        assert not synced.is_set()
        writer.append(StepRecord(2, 0.5, (0.5,), (1.0,), (0.5,), 2))
        assert synced.wait(20)


def test_a_late_sync_that_fails_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SECONDS_BETWEEN_SYNCS", 0.02)
    path = tmp_path / "a.zol"
    path.write_bytes(WHOLE[: START + SIZE])
    writer, _ = LedgerWriter.resume(path)
    with writer:
        writer.append(StepRecord(1, 0.5, (0.5,), (1.0,), (0.5,), 2))
        path.unlink()
        deadline = time.monotonic() + 20
        while writer._late._error is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match=r"step 3 could not be written.*removed"):
            writer.append(StepRecord(2, 0.5, (0.5,), (1.0,), (0.5,), 2))
