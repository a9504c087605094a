"""Own rows of any shape may be judged: what a function is given, what completions are compared with, what it takes."""

import json

import numpy as np
import pytest

from zotune.errors import UsageError
from zotune.llm.config.data import DataOptions
from zotune.llm.config.run import EvalConfig, TrainConfig
from zotune.llm.scoring.generated_answers import f1
from zotune.llm.scoring.generation import generate
from zotune.llm.tasks.load_data import load_rows
from zotune.llm.training.evaluation import evaluate
from zotune.llm.training.train import train
from zotune.plan.dry_run import dry_run

CHATML = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION, ANSWER = {"role": "user", "content": "who?"}, {"role": "assistant", "content": "me "}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """The name of a function of generated text: the letters of prompt and reference."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    name = f"own_rewards_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(
        "def r(batch):\n    return [len(c.prompt) + len(c.text) + 100 * len(c.references) for c in batch]\n",
        encoding="utf-8",
    )
    return f"{name}:r"


@pytest.fixture
def judged(tmp_path, tiny, reward):
    """A function: one row and options to what the reward's function would be given of it."""
    lm = tiny("llama")
    lm.tokenizer.chat_template = CHATML

    def make(row, **options):
        path = write(tmp_path / "rows.jsonl", [row])
        return lm, load_rows(lm, DataOptions(eval_file=path, objective=reward, **options)).test[0]

    return make


@pytest.mark.parametrize(
    ("row", "options", "prompt", "references"),
    [
        ({"prompt": "p "}, {}, "p ", ()),
        ({"text": "t"}, {}, "t", ()),
        ({"text": "t", "label": 3.0}, {"template": "{text}?"}, "t?", ("3",)),
        ({"prompt": "p", "label": ["a", "b "]}, {}, "p", ("a", "b")),
        ({"prompt": "p", "completion": " c"}, {}, "p", ("c",)),
        ({"prompt": "p", "completion": " c"}, {"data_format": "completion"}, "p", ("c",)),
        ({"prompt": "p", "choices": ["a", "b"], "label": 1}, {"data_format": "choice"}, "p", ("b",)),
        ({"messages": [QUESTION]}, {}, "<s><|user|>who?</s>\n<|assistant|>", ()),
        ({"messages": [QUESTION, ANSWER]}, {}, "<s><|user|>who?</s>\n<|assistant|>", ("me",)),
    ],
)
def test_a_function_is_given_the_prompt_and_what_the_row_knows_of_the_answer(judged, row, options, prompt, references):
    lm, found = judged(row, **options)
    assert (found.text, found.answers, found.sequences) == (prompt, references, ())
    # The template of a chat has put the special tokens; nothing is put before them again.
    ids = lm.tokenizer(prompt, add_special_tokens="messages" not in row)["input_ids"]
    assert list(found.prompt) == ids and ids.count(lm.tokenizer.bos_token_id) == 1


def test_a_prompt_alone_needs_a_function_and_a_missing_column_is_named(tmp_path, tiny, judged):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    with pytest.raises(UsageError, match=r"contain no right answer: give --objective MODULE:FUNCTION"):
        load_rows(tiny("llama"), DataOptions(eval_file=path, data_format="prompt"))
    with pytest.raises(UsageError, match=r"line 1: there is no column 'text'"):
        judged({"txt": "p"})


@pytest.mark.parametrize("name", ["f1", "exact_match"])
def test_completions_are_what_generated_text_is_compared_with(tmp_path, tiny, name):
    lm = tiny("llama")
    rows = [{"prompt": "A", "completion": " x"}, {"prompt": "so it", "completion": " y z"}]
    options = DataOptions(eval_file=write(tmp_path / "rows.jsonl", rows), objective=name, max_new_tokens=5)
    loaded = load_rows(lm, options)
    texts = [generate(lm, [e.prompt], 5)[0] for e in loaded.test]
    found = loaded.measure(lm, loaded.test, 2)
    assert found.predictions == tuple(texts)
    assert found.f1 == pytest.approx(sum(f1(t, [r["completion"]]) for t, r in zip(texts, rows, strict=True)) / 2)
    with pytest.raises(UsageError, match=rf"line 1: {name} compares one generated line of at most 1 tokens"):
        load_rows(lm, DataOptions(**{**options.model_dump(), "max_new_tokens": 1}))


@pytest.mark.parametrize("name", ["classification", "accuracy"])
def test_objectives_that_choose_refuse_rows_without_a_choice(tmp_path, tiny, name):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "A", "completion": " x"}])
    with pytest.raises(UsageError, match="each of these rows has a single answer"):
        load_rows(tiny("llama"), DataOptions(eval_file=path, objective=name))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_queries": 2, "difference": "forward"}, {"blocks": "layer"}, {"tuning": "lora", "tuned_layers": 1}],
    ids=lambda o: "-".join(map(str, o)),
)
def test_a_dry_run_foretells_the_passes_of_generated_text_where_none_ends_early(config, reward, options):
    made = config(objective=reward, max_new_tokens=3, stop_at="end", **options)
    foretold, found = dry_run(made), train(made)
    # A text may end before it is three tokens long.
    assert 0.6 * foretold.forward_passes["training"] < found.num_forwards <= foretold.forward_passes["training"]
    assert foretold.examples[0].endswith("⟦⟧ | yes") or foretold.examples[0].endswith("⟦⟧ | no")
    longer = dry_run(made.model_copy(update={"max_new_tokens": 30}))
    assert longer.memory.activations > foretold.memory.activations


def test_what_was_tuned_on_a_reward_is_evaluated_by_it_with_demonstrations_and_predictions(tmp_path, config, reward):
    rows = [{"prompt": f"prompt {i}", "label": f"reference {i}"} for i in range(8)]
    path = write(tmp_path / "prompts.jsonl", rows)
    made = config(train_file=path, num_dev=2, objective=reward, max_new_tokens=3, stop_at="end", eval_steps=1,
                  load_best_model_at_end=True, metric_for_best_model="metric")  # fmt: skip
    result = train(TrainConfig.model_validate(made.model_dump()))
    assert result.dev.value == pytest.approx(sum(result.dev.values) / 2) and result.best_step is not None
    options = {"num_demonstrations": 2, "baselines": True, "predictions": tmp_path / "predictions.jsonl"}
    found, results = evaluate(
        EvalConfig(
            model=str(made.output_dir),
            device="cpu",
            train_file=path,
            eval_file=path,
            num_eval=3,
            objective=reward,
            max_new_tokens=3,
            **options,
        )
    )
    assert results["reward"] == pytest.approx(found["rows"].evaluation.reward)
    records = [json.loads(line) for line in options["predictions"].read_text(encoding="utf-8").splitlines()]
    drawn = [rows[i] for i in sorted(np.random.RandomState(0).permutation(8)[:3])]
    for record, row in zip(records, drawn, strict=True):
        assert record["prompt"].endswith(f"\n\n{row['prompt']}") and record["answers"] == [row["label"]]
        assert record["prompt"].count("reference") == 2
        assert record["reward"] == len(record["prompt"]) + len(record["prediction"]) + 100
    assert found["rows"].majority is None and found["rows"].difference is None
    assert found["rows"].zero_shot is not None


@pytest.mark.sample(1)
@pytest.mark.parametrize("method", ["zo_sgd", "zo_adam"])
def test_a_run_on_a_reward_goes_on_to_the_same_bits_and_counts(tmp_path, config, reward, method):
    from safetensors.torch import load_file

    options = {"objective": reward, "method": method, "max_new_tokens": 3, "generation": "sample", "mu": 0.1}
    whole = config(**options, max_steps=4, learning_rate=1e-2, output_dir=tmp_path / "whole")
    train(whole)
    parts = whole.model_copy(update={"output_dir": tmp_path / "parts", "max_steps": 2})
    train(parts)
    train(parts.model_copy(update={"max_steps": 4, "resume": True}))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("whole", "parts")
    ]
    kept = ("step", "loss", "num_forwards", "num_flat", "held_out")
    assert [[line[k] for k in kept] for line in lines[0]] == [[line[k] for k in kept] for line in lines[1]]
