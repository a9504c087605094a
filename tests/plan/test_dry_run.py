"""A dry run says what the run then does: forward passes, tuned numbers, state, rows; and leaves no trace."""

import json

import pytest
import torch
import yaml

from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.run import TrainConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load
from zotune.llm.models.meta_model import load_meta_model
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.training.optimizers import make_optimizer
from zotune.llm.training.train import train
from zotune.methods.table import METHODS
from zotune.plan.dry_run import dry_run
from zotune.plan.live_memory import peak_of, peaks_of
from zotune.plan.memory import state_bytes
from zotune.plan.shown_rows import quantiles

# Every method, every option that changes how often the model is called, and every one that changes the state.
RUNS = [
    *({"method": method} for method in (*METHODS, *FIRST_ORDER)),
    {"num_queries": 3, "gradient_accumulation_steps": 2},
    {"num_queries": 3, "difference": "forward"},
    {"blocks": "layer", "num_queries": 2},
    {"blocks": "part", "block_order": "sequential"},
    {"method": "zo_sgd_cons", "difference": "forward"},
    {"hybrid_layers": 1, "hybrid_method": "fo_adam", "gradient_accumulation_steps": 2},
    {"tuning": "prefix", "method": "zo_adam"},
    {"method": "zo_adam", "adam": "amsgrad"},
    {"method": "zo_adam", "adam": "adamm", "tuning": "lora"},
    {"method": "zo_adam", "window": 3},
    {"method": "zo_sgd_mmt", "dtype": "bfloat16", "rounding": "master"},
    {"method": "fo_sgd", "dtype": "float16"},
    {"hybrid_layers": 1, "hybrid_method": "fo_adam", "hybrid_tied": "zeroth_order", "dtype": "bfloat16"},
]
# Their options occur in others.
MORE = [
    {"blocks": "layer", "difference": "forward"},
    {"blocks": "layer", "block_order": "sequential", "difference": "forward"},
    {"method": "zo_sgd_cons", "blocks": "layer"},
    {"method": "fo_sgd", "gradient_accumulation_steps": 3},
    {"tuning": "lora"},
    {"method": "zo_sgd", "dtype": "bfloat16", "rounding": "master"},
    {"method": "fo_adam", "dtype": "bfloat16"},
    {"method": "zo_adam", "hybrid_layers": 1, "hybrid_method": "fo_adam"},
]


def name_of(options):
    return "-".join(map(str, options.values()))


@pytest.mark.sample(7)
@pytest.mark.parametrize(
    "options", [*RUNS, *(pytest.param(options, marks=pytest.mark.slow) for options in MORE)], ids=name_of
)
def test_a_run_takes_the_passes_tunes_the_numbers_and_keeps_the_state_that_were_foretold(config, options, monkeypatch):
    made = config(**options)
    optimizers = []

    def remembering(*args, **more):
        optimizers.append(make_optimizer(*args, **more))
        return optimizers[-1]

    monkeypatch.setattr("zotune.llm.training.loop.make_optimizer", remembering)
    foretold = dry_run(made)
    found = train(made)
    assert foretold.forward_passes["training"] == found.num_forwards
    assert foretold.num_tuned == found.num_tuned
    (optimizer,) = optimizers
    parts = [optimizer.zeroth_order, optimizer.first_order] if hasattr(optimizer, "zeroth_order") else [optimizer]
    tensors = [t for part in parts for s in part.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    # Bases of subspaces belong to the sampler, in a run as in its prediction.
    bases = getattr(getattr(optimizer, "sampler", None), "_bases", None)
    tensors += [] if bases is None else bases._found.values()
    size = sum(t.nbytes for t in tensors if t.dim())
    assert foretold.memory.state == size == state_bytes(optimizer, made)


@pytest.mark.sample(2)
@pytest.mark.parametrize("tuning", ["full", "head", "lora", "prefix", "prompt"])
def test_a_skeleton_has_the_models_shapes_and_no_weight(family, tuning):
    options = TrainConfig(model=f"random:{family}-tiny", task="sst2", tuning=tuning, device="cpu")
    whole = load(options)
    prepare_tuning(whole, options)
    found = dry_run(options.model_copy(update={"num_train": 4, "num_dev": 2, "num_eval": 2}))
    assert found.num_tuned == sum(p.numel() for p in whole.module.parameters() if p.requires_grad)
    assert found.memory.weights == sum(p.nbytes for p in whole.module.parameters())
    bare, _ = load_meta_model(ModelOptions(model=options.model))
    assert {p.device.type for p in bare.module.parameters()} == {"meta"}


def test_small_tensors_lie_in_a_heap_that_stays_and_has_holes_and_large_ones_do_not():
    def compute():
        small = [torch.empty(100, device="meta") for _ in range(5)]  # 400 bytes each
        del small
        large = torch.empty(1000, device="meta")
        return large + 1

    assert peaks_of(compute, lambda: 0)[0] == 2 * 4000
    assert peaks_of(compute, lambda: 0, own_pages=401)[0] == 2 * 4000 + 5 * 400 * 3 / 2
    assert peaks_of(compute, lambda: 0, own_pages=400)[0] == 2 * 4000


def test_memory_of_a_forward_pass_is_that_of_its_living_tensors():
    def compute():
        a = torch.empty(1000, 10, device="meta")
        b = a @ torch.empty(10, 50, device="meta")  # 40,000 + 2,000 + 200,000 bytes
        del a
        c = b.view(-1)[:10]  # no memory of its own
        b = torch.relu(b)  # beside the first b, which c still holds
        return c.sum() + b.sum()

    # At the end: two of 50 · 1000 numbers, and three single ones.
    assert peak_of(compute) == 2 * 200_000 + 3 * 4
    query = torch.empty(1, 2, 64, 8, device="meta")
    attention = torch.nn.functional.scaled_dot_product_attention
    # Its output, and a number in single precision for each of 2 · 64 heads and positions.
    own = query.nbytes + 4 * 2 * 64
    assert peak_of(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query)) == own
    assert torch.nn.functional.scaled_dot_product_attention is attention


def test_back_propagation_takes_more_and_checkpointing_less(config):
    def activations(**options):
        return dry_run(config(per_device_train_batch_size=8, **options)).memory.activations

    forward = activations()
    assert forward < activations(method="fo_sgd", gradient_checkpointing=True) < activations(method="fo_sgd")
    assert activations(method="fo_sgd", hybrid_layers=None) > activations(hybrid_layers=1)
    # Adam's state is told apart from what is kept for the gradient.
    assert activations(method="fo_adam") == pytest.approx(activations(method="fo_sgd"), rel=0.3)


def test_nothing_is_written_or_read_of_the_weights(zotune, short, tmp_path, monkeypatch):
    monkeypatch.setattr("zotune.llm.models.load.load", lambda *_: pytest.fail("a dry run reads no weights"))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*")}
    said = zotune(*short("--dry-run"))
    assert (said.code, said.err) == (0, "")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*")} == before
    assert "8 for training, 3 held out, 3 for evaluation" in said.out
    assert "\x1b" not in said.out


def test_json_is_one_object_that_holds_all(zotune, short):
    said = zotune(*short("--dry-run", "--json"))
    found = json.loads(said.out)
    assert found["num_rows"] == {"train": 8, "dev": 3, "test": 3}
    assert found["config"]["verbalizer"] == {"no": "no", "yes": "yes"}
    parts = {k: v for k, v in found["memory"].items() if k not in ("total", "running", "loading")}
    assert found["memory"]["total"] == found["memory"]["running"] == sum(parts.values())
    assert len(found["examples"]) == 3
    assert {"tokens", "num_cut", "refused", "num_tuned", "forward_passes", "notes"} <= set(found)


def test_examples_show_what_is_read_and_mark_what_is_scored(config):
    made = config(verbalizer={"yes": "good", "no": "bad"})
    label_of = {row["text"]: row["label"] for row in map(json.loads, made.train_files[0].read_text().splitlines())}
    first = dry_run(made).examples[0]
    read, _, rest = first.partition("⟦")
    scored, _, other = rest.partition("⟧")
    assert read.startswith("<s>") and read.endswith("\nLabel:")
    # The tiny vocabulary has " good" and " bad" as tokens; the row's own label says which is right.
    text = read.removeprefix("<s>").removesuffix("\nLabel:")
    right = {"yes": " good", "no": " bad"}[label_of[text]]
    assert (scored, other) == (right, f" | ⟦{' bad' if right == ' good' else ' good'}⟧")
    masked = dry_run(config(model="random:roberta-tiny", verbalizer={"yes": " good", "no": " bad"})).examples[0]
    assert "⟦ good⟧" in masked and masked.index("⟦") < masked.index("</s>")


def test_rows_that_are_cut_or_refused_are_counted_and_named(config, tmp_path, zotune, short):
    rows = tmp_path / "long.jsonl"
    texts = ["a", "b " * 40, "c " * 400, "d", "e"]
    rows.write_text("".join(json.dumps({"text": t, "label": i % 2}) + "\n" for i, t in enumerate(texts)))
    found = dry_run(config(train_file=rows, num_dev=0))
    (refused,) = found.refused
    assert f"{rows}, line 3 has 809 tokens" in refused
    assert (found.num_cut, found.tokens["max"]) == (0, 809)
    cut = dry_run(config(train_file=rows, num_dev=0, max_length=50))
    assert (cut.refused, cut.num_cut) == ((), 2)
    said = zotune(*short("--train-file", rows, "--num-dev", 0, "--dry-run"))
    assert said.code == 2 and "refused: 1" in said.out


def test_quantiles_by_hand():
    assert quantiles(list(range(1, 101))) == {"min": 1, "median": 50.5, "p95": 96, "max": 100}
    assert quantiles([]) == {}


@pytest.mark.parametrize("method", ["zo_sgd", "zo_adam"])
@pytest.mark.slow
def test_the_memory_of_a_process_is_what_was_foretold(start, tmp_path, smollm2, method):
    """Within an eighth: allocators add to it."""
    del smollm2  # fetched by then
    run = ["train", "--task", "sst2", "--model", "smollm2-135m", "--dtype", "float32", "--method", method]
    run += ["--num-train", 32, "--num-dev", 8, "--num-eval", 8, "--max-steps", 2, "--device", "cpu", "--json"]
    out = []
    for more in (["--dry-run"], ["--output-dir", tmp_path / "out"]):
        process = start("-m", "zotune", *run, *more)
        out.append(json.loads(process.communicate(timeout=300)[0]))
        assert process.returncode == 0
    assert out[0]["memory"]["total"] == pytest.approx(out[1]["peak_memory"], rel=1 / 8)


def test_a_dry_run_says_what_a_search_costs_and_which_rate_is_far_off(zotune, short):
    said = zotune(*short("--dry-run", "--tuning", "lora", "--max-steps", "200"))
    assert said.code == 0 and "400 in all, and at most 100 to find the learning rate" in said.out
    said = zotune(*short("--dry-run", "--tuning", "lora", "--max-steps", "199"))  # has no room for a search
    assert said.code == 0 and "398 in all" in said.out and "to find the learning rate" not in said.out
    said = zotune(*short("--dry-run", "--tuning", "lora", "--learning-rate", "100"))
    assert "the learning rate 100 is above the range" in said.out and "to find the learning rate" not in said.out


def test_the_options_that_are_shown_and_the_defaults_of_the_others_are_the_run(tmp_path):
    options = dict(model="random:llama-tiny", task="sst2", num_train=8, num_dev=4, learning_rate=1e-2, lora_r=2)
    config = TrainConfig(**options, tuning="lora", max_steps=4, output_dir=tmp_path / "run")
    forecast = dry_run(config)
    text = str(forecast)
    recipe = yaml.safe_load(text.partition("other options")[0].rpartition("\n")[0])
    assert TrainConfig.model_validate(recipe) == forecast.config
    assert {"model", "lora_r", "num_train", "seed"} <= recipe.keys()
    assert not {"hybrid_layers", "adam_beta1"} & recipe.keys()
    assert f"{len(TrainConfig.model_fields) - len(recipe)} other options" in text
