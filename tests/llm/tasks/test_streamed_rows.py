"""Rows of a stream are not held in memory, and a run on them resumes to the bits of a run in one part."""

import json
import tracemalloc

import pytest

from zotune.errors import UsageError
from zotune.llm import train
from zotune.llm.config.data import DataOptions
from zotune.llm.config.run import TrainConfig
from zotune.llm.data.readers import LocatedRow
from zotune.llm.data.stored_rows import SelectedRows, StoredRows
from zotune.llm.rows import sources
from zotune.llm.rows.sources import RowStreams, UserRows
from zotune.llm.tasks import streaming
from zotune.llm.tasks.load_data import load_rows, load_training_rows
from zotune.plan.dry_run import dry_run
from zotune.system.bounds import ROWS


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(n, length=8):
    return ({"prompt": f"Row {i}:", "completion": " " + chr(97 + i % 26) * length} for i in range(n))


@pytest.fixture
def lm(tiny):
    return tiny("llama")


def streamed(lm, rows, **options):
    located = (LocatedRow(f"row {i}", row) for i, row in enumerate(rows))
    config = TrainConfig(data_source="memory", streaming=True, **options)
    return load_training_rows(lm, config, UserRows(stream=RowStreams("rows", (located,))))


def test_a_stream_gives_the_tokens_of_the_same_rows_in_memory(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "HEAD", 5)
    path = write(tmp_path / "rows.jsonl", rows_of(20))
    held = load_rows(lm, DataOptions(eval_file=path)).test
    found = load_training_rows(lm, TrainConfig(train_file=path, streaming=True, num_dev=3, num_train_epochs=1))
    assert (tuple(found.train), found.dev) == (held[3:], held[:3])
    assert isinstance(found.train, StoredRows) and "17 rows are kept as tokens on the disk" in found.notes[-1]


def test_beside_a_stream_a_files_evaluation_rows_are_all_read_or_drawn_as_without_one(lm, tmp_path, monkeypatch):
    """Files are often sorted, so that their first rows would not stand for all."""
    monkeypatch.setattr(sources, "MAX_STREAMED_EVALUATION", 5)
    paths = {
        "train_file": write(tmp_path / "t.jsonl", rows_of(4)),
        "eval_file": write(tmp_path / "e.jsonl", rows_of(9)),
    }
    for number in (None, 3):
        options = {**paths, "num_eval": number, "max_steps": 1}
        found = load_training_rows(lm, TrainConfig(streaming=True, **options))
        assert found.test == load_rows(lm, TrainConfig(**options)).test
        assert len(found.test) == (number or 9)


def test_of_a_data_set_of_the_hub_the_first_rows_are_evaluated_and_a_run_says_so(monkeypatch, capsys):
    num_read = 0

    def endless(source, split, delimiter):
        nonlocal num_read
        for row in rows_of(10**9):
            num_read += 1
            yield LocatedRow(f"row {num_read}", row)

    monkeypatch.setattr(sources, "read_located_rows", endless)
    options = TrainConfig(train_file="hub:o/n:train", eval_file="hub:o/n:test", streaming=True, num_eval=7)
    assert len(sources.stream_files(options).eval.rows) == 7
    assert num_read == 8
    assert "hub:o/n:test has more than 7 rows" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_rows_and_no_more_are_read_than_the_steps_need(lm, monkeypatch):
    monkeypatch.setattr(streaming, "HEAD", 20)
    monkeypatch.setenv(ROWS.variable, "50")  # whatever is held at once is bounded, a stream is not
    peaks, num_read = [], 0

    def endless():
        nonlocal num_read
        for row in rows_of(10**9, length=500):
            num_read += 1
            yield row

    for n in (100, 400):
        num_read = 0
        tracemalloc.start()
        rows = streamed(lm, endless(), max_steps=n // 10, per_device_train_batch_size=5, gradient_accumulation_steps=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(rows.train) == n == num_read
    # As tokens in memory the 300 rows more take at least three numbers of eight bytes for each of 500 tokens.
    assert peaks[1] - peaks[0] < 300 * 500 * 3 * 8 / 10


def test_a_streamed_run_resumes_to_the_same_bits(zotune, short, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "HEAD", 4)
    files = [write(tmp_path / name, rows_of(n)) for name, n in (("a.jsonl", 12), ("b.jsonl", 6))]
    given = ["--train-file", *files, "--streaming", "--train-file-weights", 2, 1, "--num-train", 12]
    run = short(*given, "--per-device-train-batch-size", 4)
    ledgers = []
    for parts in ((4,), (2, 4)):
        out = tmp_path / f"out{len(parts)}"
        for steps in parts:
            said = zotune(*run, "--max-steps", steps, "--output-dir", out, "--resume")
            assert said.code == 0, said.err
        ledgers.append((out / "ledger.zol").read_bytes())
    assert ledgers[0][-64:] == ledgers[1][-64:] and len(ledgers[0]) == len(ledgers[1])
    assert "12 rows are kept as tokens" in said.err
    said = zotune(*run, "--max-steps", 4, "--output-dir", out, "--resume", "--num-train", 11)
    assert said.code == 2 and "num_train" in said.err


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("options", "num_rows", "num_steps"),
    [
        ({"num_train_epochs": 1}, 26, 7),
        ({"num_train_epochs": 1, "num_dev": 2}, 24, 6),
        ({"num_train_epochs": 2, "num_train": 10}, 10, 5),
        ({"num_train_epochs": 1, "train_file_weights": (1, 1)}, 40, 10),
        ({"num_train_epochs": 1, "packing": True, "max_length": 16}, 9, 3),
        ({"num_train_epochs": 1, "max_length": 12, "long_rows": "drop"}, 25, 7),
        ({"max_steps": 3}, 12, 3),
        ({"max_steps": 30}, 26, 30),
    ],
)
def test_a_dry_run_counts_all_rows_of_a_stream(lm, tmp_path, monkeypatch, options, num_rows, num_steps):
    monkeypatch.setattr(streaming, "HEAD", 4)
    monkeypatch.setenv(ROWS.variable, "9")
    key = "text" if "packing" in options else "completion"
    rows = [({key: " ab"} if key == "text" else {"prompt": "a", key: " b" * (20 if i == 9 else 1)}) for i in range(20)]
    files = (write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:6]))
    more = {"train_file": files, "per_device_train_batch_size": 4, "streaming": True, "max_length": 64}
    config = TrainConfig(model="random:llama-tiny", device="cpu", **{**more, **options})
    foretold = dry_run(config)
    assert (foretold.num_rows["train"], foretold.config.max_steps) == (num_rows, num_steps)
    assert len(load_training_rows(lm, config).train) == num_rows
    assert "the first 4 rows stand for all" in "".join(foretold.notes)


def test_a_streamed_run_resumes_for_more_steps_on_the_rows_of_its_start(zotune, short, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "HEAD", 4)
    file = write(tmp_path / "a.jsonl", rows_of(60))
    run = short("--train-file", file, "--streaming", "--per-device-train-batch-size", 4, "--resume")
    for steps in (2, 4):
        said = zotune(*run, "--max-steps", steps)
        assert said.code == 0, said.err
        assert "8 rows are kept as tokens" in said.err
    said = zotune(*run, "--max-steps", 5, "--num-train", 20)
    assert said.code == 2 and "a run with num_train: 8, so it cannot resume with 20" in said.err


def test_python_resumes_a_stream_for_more_steps(lm, tmp_path):
    options = {"per_device_train_batch_size": 2, "learning_rate": 0.01, "streaming": True, "resume": True}
    for steps in (2, 4):
        result = train(lm.module, lm.tokenizer, rows_of(30), output_dir=tmp_path / "out", max_steps=steps, **options)
    assert result.num_steps == 4


def test_a_generator_is_learnt_from_python(lm):
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "streaming": True}
    with pytest.raises(UsageError, match="train_dataset contains no row to train on"):
        train(lm.module, lm.tokenizer, iter(()), **options)
    result = train(lm.module, lm.tokenizer, rows_of(10**9), list(rows_of(3)), **options)
    assert (result.num_steps, result.test.num_examples) == (2, 3)


def test_a_broken_row_is_named_wherever_it_is(lm, monkeypatch):
    monkeypatch.setattr(streaming, "HEAD", 2)
    with pytest.raises(UsageError, match="row 7: the column 'completion' is null"):
        streamed(lm, ({**row, "completion": None if i == 7 else " x"} for i, row in enumerate(rows_of(9))))
    with pytest.raises(UsageError, match="row 5: the label 'new' is not in the verbalizer"):
        streamed(lm, ({"text": "t", "label": "new" if i == 5 else i % 2} for i in range(9)))


def test_texts_of_a_stream_are_packed(lm):
    found = streamed(lm, ({"text": f"text {i}"} for i in range(40)), packing=True, max_length=16, num_train_epochs=1)
    held = [len(e.sequences[0]) for e in found.train]
    assert set(held[:-1]) == {16} and found.train[3] == list(found.train)[3]


def test_rows_on_the_disk_are_a_sequence(lm, tmp_path):
    rows = load_rows(lm, DataOptions(eval_file=write(tmp_path / "rows.jsonl", rows_of(6)))).test
    stored = StoredRows(iter(rows))
    assert (len(stored), tuple(stored), stored[-1], stored[1:5:2]) == (6, rows, rows[-1], rows[1:5:2])
    assert tuple(SelectedRows(stored, [5, 0, 5])) == (rows[5], rows[0], rows[5])
    with pytest.raises(IndexError):
        stored[6]


def test_a_stream_without_files_of_training_rows_is_refused(zotune, tmp_path):
    said = zotune("eval", "--model", "random:llama-tiny", "--eval-file", tmp_path / "a.jsonl", "--streaming")
    assert said.code == 2 and "streaming is for training rows" in said.err
