"""A plan's terms are those counted by hand, its parts add up, and what it calls the largest that fits is."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, OPTConfig

from zotune.errors import UsageError
from zotune.llm.config.method import FIRST_ORDER
from zotune.llm.config.schema import validate
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load
from zotune.llm.models.random_models import ARCHITECTURES
from zotune.methods.table import METHODS
from zotune.plan.formulas import FORMULAS
from zotune.plan.options import PlanConfig, memory_bytes
from zotune.plan.planning import plan
from zotune.plan.predict import Architecture, predict
from zotune.plan.search import largest
from zotune.plan.workload import Workload

# Methods whose state are bases of subspaces, and coordinates in these.
IN_SUBSPACES = ("subzero", "lozo", "zo_muon", "mopi")
WIDTH, HEADS, LAYERS, VOCABULARY, CONTEXT = 48, 4, 3, 400, 128
BATCH, LENGTH = 5, 24


def opt(layers=LAYERS):
    return OPTConfig(
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
    )


def llama():
    return LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=100,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
    )


def workload(**options):
    sizes = {"per_device_train_batch_size": BATCH, "length": LENGTH}
    return validate(Workload, {"model": "config", "device": "cpu", "dtype": "float32", **sizes, **options}, "test")


def terms(config, **options):
    made = workload(**options)
    return Architecture(made, config).terms(made)


def test_terms_of_opt_are_those_counted_by_hand():
    found = terms(opt())
    h = WIDTH
    linear = 4 * (h * h + h) + (h * 4 * h + 4 * h) + (4 * h * h + h)
    layer = 4 * (linear + 2 * 2 * h)
    embedding, positions, norm = 4 * VOCABULARY * h, 4 * (CONTEXT + 2) * h, 4 * 2 * h
    assert [part.weights for part in found.layers[1:-1]] == [layer] * LAYERS
    assert found.x == found.tuned == LAYERS * layer + embedding + positions + norm
    assert found.max_tuned == max(layer, embedding)
    # Of a layer autograd keeps, a token: what enters the two norms and what leaves them (4 h), their means and
    # deviations (2 · 2), queries, keys, values (3 h), what leaves attention (h) with a number a head, and what leaves
    # the ReLU (4 h).
    kept = 4 * BATCH * LENGTH * (12 * h + 4 + HEADS)
    assert [part.activations for part in found.layers[1:-1]] == [kept] * LAYERS
    assert found.larger == sum(max(part.activations, part.weights) for part in found.layers)
    # A LoRA adapter of rank 8 beside queries and values.
    assert terms(opt(), tuning="lora").tuned == 4 * LAYERS * 2 * 2 * 8 * h


def test_weights_of_llama_are_those_counted_by_hand():
    found = terms(llama(), dtype="bfloat16")
    h, kv = WIDTH, WIDTH // 2
    layer = 2 * (2 * h * h + 2 * h * kv + 3 * h * 100 + 2 * h)
    assert [part.weights for part in found.layers[1:-1]] == [layer] * LAYERS
    assert found.layers[0].weights == 2 * VOCABULARY * h
    assert found.layers[-1].weights == 2 * (VOCABULARY * h + h)


@pytest.mark.parametrize("name", ["opt-tiny", "llama-tiny", "qwen3-tiny"])
def test_activations_are_what_autograd_keeps_of_real_tensors(name):
    made = validate(Workload, {"model": f"random:{name}", "device": "cpu", "length": 40}, "test")
    architecture = Architecture(made)
    found = architecture.terms(made)
    lm = load(ModelOptions(model=f"random:{name}", device="cpu"))
    weights = {p.data_ptr() for p in lm.module.parameters()}
    kept = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:  # alive, or another would come to lie where it lay
            kept[t.untyped_storage().data_ptr()] = (t, t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = lm.score(architecture.batch(made)).sum()
    assert loss.requires_grad
    # A real attention kernel also keeps the (empty) state of its dropout.
    assert found.a == pytest.approx(sum(size for _, size in kept.values()), rel=0.001)


def test_formulas_give_the_papers_numbers_for_opt_13b():
    """The paper's Table A1: 97, 195, 239, 103, 96, 51, 100 and 151 GiB."""
    made = validate(Workload, {"model": "facebook/opt-13b", "per_device_train_batch_size": 8, "length": 400}, "test")
    found = Architecture(made).terms(made)
    paper = (97, 195, 239, 103, 96, 51, 100, 151)
    totals = [f.total(found) / 2**30 for f in FORMULAS]
    assert totals == [pytest.approx(known, rel=0.07) for known in paper]
    assert [f.paper for f in FORMULAS] == list(paper)
    # The paper's order, of those that are apart by more than the tolerance.
    pairs = list(zip(totals, paper, strict=True))
    assert all((a < b) == (known < other) for a, known in pairs for b, other in pairs if abs(known / other - 1) > 0.1)


EVERY = pytest.param((*METHODS, *FIRST_ORDER), marks=pytest.mark.slow, id="every method")


@pytest.mark.parametrize("methods", [("zo_sgd", "zo_sgd_mmt", "zo_adam", "hizoo", "lozo", "fo_sgd", "fo_adam"), EVERY])
def test_parts_are_those_counted_by_hand(methods, monkeypatch):
    monkeypatch.setattr("zotune.plan.passes.OWN_PAGES", 0)  # no heap with holes, in which so small a model would lie
    config = opt()
    weights = terms(config).x
    common = {"batch_size": BATCH, "length": LENGTH, "dtype": "float32", "device": "cpu"}
    found = {m: predict(config, m, **common) for m in methods}
    states = {"zo_sgd_mmt": 1, "zo_adam": 2, "fo_adam": 2, "hizoo": 1}
    for method, each in found.items():
        assert each.weights == weights
        if method not in IN_SUBSPACES:
            assert each.state == states.get(method, 0) * weights
        parts = (each.weights, each.state, each.gradients, each.activations, each.scratch, each.reused, each.overhead)
        assert each.running == sum(parts) <= each.total
        assert (each.gradients > 0) == (method in FIRST_ORDER)
    # The forward pass; the second end of a probe counts as scratch. The most is alive in the ReLU: what enters and what
    # leaves it (4 h each), what goes round it, what entered the layer, and the embeddings of tokens and of positions
    # (h each); beside that some integers a token.
    tokens = BATCH * LENGTH
    integers = found["zo_sgd"].activations - 4 * tokens * (4 + 4 + 1 + 1 + 2) * WIDTH
    assert 0 <= integers <= 4 * 8 * tokens
    # An Adam step's most is its update where the batch is small: all gradients are there, and no activation.
    small = predict(config, "fo_adam", batch_size=1, length=2, dtype="float32", device="cpu")
    assert small.gradients == weights
    # Beside them what the update makes of one tensor at a time.
    assert small.activations < weights
    assert predict(config, "zo_adam", **common, window=4).state == 0


@pytest.mark.slow
def test_zeroth_order_is_flat_in_length_and_depth_and_first_order_rises():
    """The paper's figure 3 and Table 7, which know nothing of what the C library keeps: for so small a model, most."""
    config = opt(layers=16)

    def takes(*method, **options):
        found = predict(config, *method, device="cpu", **options)
        return found.running - found.overhead

    zo, fo = ([takes(method, batch_size=2, length=n) for n in (16, 32, 64, 128)] for method in ("zo_sgd", "fo_sgd"))
    assert zo[-1] - zo[0] < 0.2 * (fo[-1] - fo[0])
    assert fo == sorted(fo) and fo[-1] > fo[0]
    hybrid = [takes(batch_size=8, length=64, hybrid_layers=k, hybrid_tied="zeroth_order") for k in range(0, 17, 4)]
    assert hybrid == sorted(hybrid, reverse=True) and hybrid[0] > hybrid[-1]


def test_checkpointing_and_accumulation_change_what_back_propagation_takes():
    config = opt()

    def takes(**options):
        return predict(config, "fo_sgd", batch_size=32, length=64, device="cpu", **options)

    assert takes(gradient_checkpointing=True).activations < takes().activations
    # A second micro-batch finds the gradients of the first.
    assert takes(gradient_accumulation_steps=2).gradients > takes().gradients


def test_a_prediction_leaves_the_architecture_as_it_was():
    made = workload()
    architecture = Architecture(made, opt())
    first = architecture.predict(made)
    parameters = list(architecture.lm.module.parameters())
    for options in ({"method": "fo_adam"}, {"method": "forward_grad"}, {"hybrid_layers": 1, "hybrid_tied": "frozen"}):
        architecture.predict(workload(**options))
        assert all(p.requires_grad and p.grad is None for p in parameters)
    architecture._passes.clear()
    assert architecture.predict(made) == first


@given(st.integers(0, 200), st.integers(1, 50), st.integers(0, 20), st.integers(0, 3000), st.integers(1, 400))
def test_the_largest_that_fits_fits_and_one_more_does_not(fixed, each, curve, limit, most):
    def takes(n):
        return fixed + each * n + curve * (n // 7)

    found = largest(takes, limit, most, start=1 + each % 5)
    assert found == max((n for n in range(1, most + 1) if takes(n) <= limit), default=0)


def test_the_largest_batch_of_a_plan_is_maximal(tmp_path):
    opt(layers=1).save_pretrained(tmp_path)
    # On a GPU the process is not in the same memory.
    config = PlanConfig(model=str(tmp_path), length=64, memory="40MB", device="cuda", method="zo_sgd,fo_sgd")
    found = plan(config)
    assert found.libraries == 0
    for row in found.rows:
        at, beyond = (
            predict(str(tmp_path), row.method, batch_size=n, length=64, device="cuda").total
            for n in (row.largest, row.largest + 1)
        )
        assert at <= memory_bytes("40MB") < beyond
    assert found.rows[0].largest > found.rows[1].largest


def test_a_plan_shows_every_method_and_says_what_to_consider(zotune):
    sizes = ["--batch-size", 4, "--length", 32]
    said = zotune("plan", "--model", "random:opt-tiny", *sizes)
    assert (said.code, said.err) == (0, "")
    for name in (*METHODS, *FIRST_ORDER, "Forward-Grad"):
        assert name in said.out
    for row in ("before the layers: embedding", "model.decoder.layers.0 to 1", "after the layers: norm, head, logits"):
        assert row in said.out
    two = ["--memory", "8GB", "--largest", "length", "--method", "zo_sgd", "fo_sgd"]
    fits = zotune("plan", "--model", "random:opt-tiny", *sizes, *two)
    assert "Back-propagation fits" in fits.out and "largest length" in fits.out
    few = zotune("plan", "--model", "random:opt-tiny", "--memory", "1MB", "--method", "zo_sgd", "zo_adam")
    assert "No method fits" in few.out and "forward_grad" not in few.out


def test_json_is_one_object_whose_parts_add_up(zotune):
    said = zotune(
        "plan",
        "--model",
        "random:llama-tiny",
        "--method",
        "zo_sgd,fo_adam",
        "--memory=24GiB",
        "--largest",
        "length",
        "--json",
    )
    found = json.loads(said.out)
    assert (found["limit"], [row["method"] for row in found["methods"]]) == (24 * 2**30, ["zo_sgd", "fo_adam"])
    for row in found["methods"]:
        parts = row["prediction"]
        names = ("weights", "state", "gradients", "activations", "scratch", "reused", "overhead")
        assert parts["running"] == sum(parts[name] for name in names)
        assert row["total"] == parts["total"] + found["libraries"]
    assert {"terms", "formulas", "advice", "config"} <= set(found)


WRONG = [
    (("--method", "zo_sdg"), "zo_sgd"),
    (("--memory", "lots"), "24GB"),
    (("--memory", "0GB"), "above 0"),
    (("--memory", "24"), "unit"),
    (("--model", "random:opt-31b"), "opt-30b"),
    (("--lenght", "3"), "length"),
    (("--length", "0"), "length"),
    (("--length", "100000"), "reads at most"),
    (("--method", "fo_sgd", "--window", "3"), "no effect"),
    (("--largest", "length"), "memory"),
    (("--model", "facebook/opt-13b", "--calibrate"), "random:NAME"),
]


@pytest.mark.parametrize(("args", "told"), WRONG, ids=[" ".join(args) for args, _ in WRONG])
def test_what_cannot_be_planned_is_refused_with_what_to_do(zotune, args, told):
    model = () if "--model" in args else ("--model", "random:opt-tiny")
    said = zotune("plan", *model, *args)
    assert said.code == 2 and told in said.err
    assert said.out == ""


def test_a_folder_needs_no_more_than_its_configuration(tmp_path):
    llama().save_pretrained(tmp_path)
    assert predict(str(tmp_path), device="cpu").weights == terms(llama()).x
    (tmp_path / "config.json").write_text('{"model_type": "no-such"}')
    with pytest.raises(UsageError, match="does not describe a model that transformers knows"):
        predict(str(tmp_path))


def test_sizes_in_words():
    assert [memory_bytes(s) for s in ("24GB", "24 GiB", "0.5kb", "3B")] == [24 * 2**30, 24 * 2**30, 512, 3]
    assert set(ARCHITECTURES) > {"opt-13b"}


def test_directions_of_examples_count_the_copies_that_dense_ones_need():
    """Each group has a copy of the adapter at each point that shares a pass; thin and flipped directions have none."""
    shape = {"batch_size": 8, "length": 16, "dtype": "float32", "device": "cpu", "tuning": "lora"}
    one = predict(opt(), "zo_sgd", **shape)
    numbers = LAYERS * 2 * 2 * 8 * WIDTH  # query and value of each layer, A and B of rank 8
    found = {
        kind: predict(opt(), "zo_sgd", **shape, directions_per_batch=k, **options)
        for kind, k, options in (
            ("dense", 4, {}),
            ("more", 8, {}),
            ("thin", 8, {"rank": 1}),
            ("flipped", 8, {"flipped": True}),
        )
    }
    assert found["more"].scratch - found["dense"].scratch == 4 * numbers * 4 * 2
    assert found["thin"].scratch == found["flipped"].scratch == found["dense"].scratch - 4 * numbers * 4 * 2
    assert one.activations == found["thin"].activations
    with pytest.raises(UsageError, match=r"would take \d+ MiB of copies of what they move"):
        predict(opt(), "zo_sgd", **{**shape, "tuning": "full", "batch_size": 700}, directions_per_batch=700)
