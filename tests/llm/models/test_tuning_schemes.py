"""Every tuning scheme on every family: the base stays as it was, scores are plain transformers' and peft's.

What a prefix or prompt begins as is checked by what it does: the model must say after it what it says after
the real tokens that it was made of.
"""

import json

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import zotune as zo
from tuning_schemes import EXAMPLES, SCHEMES, moved, prepared, tuned_of
from zotune.errors import UsageError
from zotune.llm.config.run import FIRST_ORDER
from zotune.llm.config.step import ModelOptions
from zotune.llm.data.collator import collate
from zotune.llm.data.examples import Example
from zotune.llm.data.tokenization import Encoder
from zotune.llm.models.adapters import virtual_tokens
from zotune.llm.models.builtin import fetch
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import load, quiet_libraries
from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer
from zotune.llm.training.train import train
from zotune.methods.table import OF_EXAMPLES

LONG = (Example("It is", (" abc", " abd", " x"), 0), Example("so", (" it ended", " did it"), 1))

ADAPTERS = [name for name in SCHEMES if name not in ("full", "head", "layers", "pattern")]
each_adapter = pytest.mark.parametrize("scheme", ADAPTERS)
VIRTUAL = ["prefix", "prompt"]


def batch_of(lm, examples):
    encoder = Encoder(lm.tokenizer, masked=lm.masked, context=lm.context, max_length=None)
    return collate([encoder(e) for e in examples], lm.pad_token_id, torch.device("cpu"))


@torch.no_grad()
def plain_scores(lm, model, example):
    """Mean log-probabilities (a masked model's: logits) of the candidates, one unpadded sequence at a time."""
    values = []
    for candidate in example.candidates:
        if lm.masked:
            ids = lm.tokenizer(f"{example.prompt}{lm.tokenizer.mask_token}{example.suffix}")["input_ids"]
            mask = torch.ones(1, len(ids), dtype=torch.long)
            logits = model(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0, -len(ids) :].double()
            word = lm.tokenizer(candidate, add_special_tokens=False)["input_ids"][0]
            values.append(float(logits[ids.index(lm.tokenizer.mask_token_id), word]))
        else:
            start = len(lm.tokenizer(example.prompt)["input_ids"])
            ids = lm.tokenizer(example.prompt + candidate)["input_ids"]
            logits = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].double().log_softmax(-1)
            values.append(sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start))
    return torch.tensor(values, dtype=torch.float64)


def up_to_a_constant(score):
    score = score[torch.isfinite(score)]
    return score - score.mean()


@pytest.mark.parametrize("method", [name for name in zo.METHODS if name not in OF_EXAMPLES])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_of_every_method_moves_what_is_tuned_and_nothing_else(tiny, family, scheme, method):
    lm = tiny(family)
    base = {name: p for name, p in lm.module.named_parameters()}
    before = {name: p.detach().clone() for name, p in base.items()}
    prepared(lm, **SCHEMES[scheme])
    tuned = {id(p): p.detach().clone() for p in tuned_of(lm)}
    batch = batch_of(lm, EXAMPLES)
    if method in ("zo_muon", "mopi") and all(p.dim() < 2 for p in tuned_of(lm)):
        with pytest.raises(UsageError, match="none is tuned"):
            zo.METHODS[method](lm.module, 1e-2)
        return
    optimizer = zo.METHODS[method](lm.module, 1e-2)
    for _ in range(8):  # the conservative method stays where the step is too long
        loss = float(optimizer.step(lambda: lm.losses(batch).mean()))
        assert loss == loss
        if any(not torch.equal(p, tuned[id(p)]) for p in tuned_of(lm)):
            break
        optimizer.param_groups[0]["lr"] /= 3
    else:
        pytest.fail("nothing that is tuned has moved")
    for name, p in base.items():
        assert id(p) in tuned or torch.equal(p, before[name]), name
    if scheme in ADAPTERS:
        assert not tuned.keys() & {id(p) for p in base.values()}


@pytest.mark.sample(3)
@each_adapter
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # peft's own call
@torch.no_grad()
def test_scores_are_those_of_plain_peft_also_when_it_loads_what_was_saved(tiny, family, scheme, tmp_path):
    lm = moved(prepared(tiny(family), **SCHEMES[scheme]))
    lm.module.save_pretrained(str(tmp_path), save_embedding_layers=False)
    plain = PeftModel.from_pretrained(tiny(family).module, str(tmp_path)).eval()
    loaded = load(ModelOptions(model=str(tmp_path), device="cpu"))
    for examples in (EXAMPLES, EXAMPLES if lm.masked else LONG):
        batch = batch_of(lm, examples)
        score = lm.score(batch)
        for row, example in zip(score, examples, strict=True):
            for model in (lm.module, plain):
                expected = up_to_a_constant(plain_scores(lm, model, example))
                torch.testing.assert_close(up_to_a_constant(row), expected, rtol=0, atol=5e-6)
        assert torch.equal(loaded.score(batch), score)
    fresh = tiny(family)
    assert (fresh.score(batch) - score)[torch.isfinite(score)].abs().max() > 1e-4


@each_adapter
def test_an_adapter_of_a_half_precision_model_is_single_precision(tiny, family, scheme):
    lm = prepared(tiny(family, "bfloat16"), **SCHEMES[scheme])
    assert {p.dtype for p in tuned_of(lm)} == {torch.float32}
    assert {p.dtype for p in lm.base.parameters() if not p.requires_grad} >= {torch.bfloat16}
    with torch.no_grad():
        assert torch.isfinite(lm.losses(batch_of(lm, EXAMPLES))).all()


@each_adapter
def test_first_weights_follow_the_seed_and_not_the_global_random_state(tiny, scheme):
    def weights(seed):
        lm = tiny("llama")
        torch.manual_seed(len(made))
        before = torch.get_rng_state()
        prepared(lm, **SCHEMES[scheme], seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([t.flatten() for n, t in lm.module.named_parameters() if t.requires_grad])

    made = []
    for seed in (1, 1, 2):
        made.append(weights(seed))
    assert torch.equal(made[0], made[1])
    # IA3 begins with ones, VeRA's drawn matrices are not tuned.
    assert torch.equal(made[0], made[2]) == (scheme in ("ia3", "vera"))


@pytest.mark.parametrize("scheme", VIRTUAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_fresh_virtual_tokens_do_what_the_real_ones_do(tiny, causal_family, scheme, dtype):
    lm = prepared(tiny(causal_family, dtype), tuning=scheme, seed=3)
    base, count = tiny(causal_family, dtype), {"prefix": 5, "prompt": 10}[scheme]
    tokens = virtual_tokens.real_tokens(base, count, seed=3)
    assert lm.num_virtual_tokens == len(tokens) == count
    assert not set(tokens.tolist()) & set(base.tokenizer.all_special_ids)
    ids = torch.tensor([[0, 70, 80, 90, 75, 60, 61, 62, 63, 64, 65, 66, 67]])
    found = lm.read(ids, torch.ones_like(ids))[:, -ids.shape[1] :]
    expected = base.read(torch.cat([tokens[None], ids], 1), torch.ones(1, 1))[:, count:]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 if dtype == "float32" else 2e-2)
    alone = base.read(ids, torch.ones_like(ids))
    assert (found - alone).abs().max() > 1e-3


@torch.no_grad()
def test_fresh_prompt_rows_are_rows_of_the_embedding(tiny, family):
    lm = prepared(tiny(family), tuning="prompt", num_virtual_tokens=4)
    embedding = lm.base.get_input_embeddings()
    (rows,) = tuned_of(lm)
    assert rows.shape == (4, embedding.embedding_dim)
    everything = embedding(torch.arange(lm.config.vocab_size))
    assert all((everything == row).all(1).any() for row in rows)


@torch.no_grad()
def test_a_fresh_prefix_of_a_masked_model_holds_its_keys_and_values(tiny):
    lm, base = prepared(tiny("roberta"), tuning="prefix", seed=2), tiny("roberta")
    caught = []
    for layer in base.module.roberta.encoder.layer:
        for part in (layer.attention.self.key, layer.attention.self.value):
            part.register_forward_hook(lambda module, args, output: caught.append(output[0]))
    base.module(input_ids=virtual_tokens.real_tokens(base, 5, seed=2)[None])
    (prefix,) = tuned_of(lm)
    torch.testing.assert_close(prefix, torch.cat(caught, 1), rtol=0, atol=1e-6)


def test_virtual_tokens_are_made_of_ordinary_tokens_that_the_seed_draws_from_all_of_them(tiny):
    lm = tiny("llama")
    drawn = [virtual_tokens.real_tokens(lm, 500, seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    ordinary = set(range(len(lm.tokenizer))) - set(lm.tokenizer.all_special_ids)
    assert set().union(*drawn) <= ordinary
    assert len(set().union(*drawn)) > 0.9 * len(ordinary)


@pytest.mark.parametrize("scheme", VIRTUAL)
@torch.no_grad()
def test_virtual_tokens_take_of_the_context(tiny, family, scheme):
    plain, lm = tiny(family), prepared(tiny(family), tuning=scheme, num_virtual_tokens=7)
    assert lm.context == plain.context - 7
    ids = torch.full((1, lm.context), 70)
    assert torch.isfinite(lm.read(ids, torch.ones_like(ids))).all()


# Sizes -----------------------------------------------------------------------------------------------------

# Millions of tuned numbers, as the settings of the paper's code give them.
SIZES = {
    "opt-1.3b": {"lora": 1.57, "prefix": 0.49, "prompt": 0.020},
    "opt-13b": {"lora": 6.55, "prefix": 2.05, "prompt": 0.051},
    "llama2-7b": {"lora": 4.19, "prefix": 1.31, "prompt": 0.041},
    "mistral-7b": {"lora": 3.41, "prefix": 0.33, "prompt": 0.041},
    "roberta-large": {"lora": 0.79, "prefix": 0.25, "prompt": 0.010},
    "opt-350m": {"lora": 0.79, "prefix": 0.25, "prompt": 0.005},
}


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("opt-13b", "llama2-7b") else name for name in SIZES],
)
@pytest.mark.parametrize("scheme", ["lora", "prefix", "prompt"])
def test_adapters_of_the_papers_models_have_the_published_sizes(name, scheme, monkeypatch):
    quiet_libraries()
    config = ARCHITECTURES[name]()
    masked = config.model_type == "roberta"
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        module = auto.from_config(config).eval()
    seen = []
    # There are no numbers on the meta device to begin with, only shapes.
    monkeypatch.setattr(virtual_tokens, "_set_virtual_tokens", lambda lm, values: seen.append(values.shape))
    lm = prepared(LanguageModel(module, byte_tokenizer(config), name, masked), tuning=scheme)
    assert sum(p.numel() for p in tuned_of(lm)) / 1e6 == pytest.approx(SIZES[name][scheme], rel=0.03, abs=0.0005)
    assert seen == ([] if scheme == "lora" else [tuned_of(lm)[0].shape])


# Schemes by name -------------------------------------------------------------------------------------------

BY_NAME = {
    "adalora": {"total_step": 10},
    "boft": {},
    "fourierft": {"n_frequency": 10},
    "loha": {},
    "lokr": {},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "oft": {},
    "vblora": {"vector_length": 8, "num_vectors": 4, "topk": 2},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BY_NAME)
def test_schemes_of_peft_tune_by_their_name(tiny, name):
    lm = prepared(tiny("llama"), tuning="peft", peft_type=name, peft_config=BY_NAME[name])
    batch, before = batch_of(lm, EXAMPLES), [p.detach().clone() for p in tuned_of(lm)]
    zo.zo_sgd(lm.module, 1e-2).step(lambda: lm.losses(batch).mean())
    assert any(not torch.equal(p, q) for p, q in zip(tuned_of(lm), before, strict=True))


def test_unknown_schemes_keys_and_values_are_named_with_what_there_is(tiny):
    with pytest.raises(UsageError, match=r"peft has no adapter 'ia4'\. Did you mean 'ia3'"):
        prepared(tiny("llama"), tuning="peft", peft_type="ia4")
    with pytest.raises(UsageError, match=r"vera of peft has no key 'target_module'\. Did you mean 'target_modules'"):
        prepared(tiny("llama"), tuning="peft", peft_type="vera", peft_config={"target_module": ["q_proj"]})
    with pytest.raises(UsageError, match="no key 'task_type'"):
        prepared(tiny("llama"), tuning="peft", peft_type="vera", peft_config={"task_type": "SEQ_CLS"})
    with pytest.raises(UsageError, match=r"peft cannot tune random:opt-tiny with vera as configured.*target_modules"):
        prepared(tiny("opt"), tuning="peft", peft_type="vera", peft_config={"target_modules": ["nowhere"]})
    with pytest.raises(UsageError, match=r"peft cannot tune random:llama-tiny with adalora.*--peft-config"):
        prepared(tiny("llama"), tuning="peft", peft_type="adalora")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tuning", "peft"), "needs the name of one of peft's schemes"),
        (("--peft-type", "ia3"), "peft_type needs tuning: peft, not full"),
        (("--tuning", "lora", "--num-virtual-tokens", 3), "num_virtual_tokens needs tuning: prefix or prompt"),
        (("--tuning", "prompt", "--tuned-layers", 1), "tuned_layers needs tuning: full or norms or"),
        (("--tuning", "head", "--tuned-parameters", "x"), "tuned_parameters needs tuning: full, not head"),
        (("--tuning", "peft", "--peft-type", "ia3", "--peft-config", "[1]"), 'must be a mapping, like {"r": 4}'),
        (("--tuning", "peft", "--peft-type", "ia3", "--peft-config", "{"), 'must be a mapping, like {"r": 4}'),
        (("--tuning", "prefix", "--method", "fo_sgd", "--gradient-checkpointing"), "drops the keys and values"),
        (("--no-reuse-activations", "--reuse-file", 1), "reuse_file has no effect"),
    ],
)
def test_options_that_do_not_go_together_are_refused(zotune, short, options, said):
    answer = zotune(*short(*options))
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", FIRST_ORDER)
@each_adapter
def test_first_order_baselines_tune_the_same_adapters(config, method, scheme, tmp_path):
    words = {"yes": "Yes", "no": "No"}
    options = {**SCHEMES[scheme], "method": method, "verbalizer": words, "learning_rate": 0.05, "max_steps": 1}
    train(config(model="random:opt-tiny", **options))
    after = load_file(tmp_path / "out/adapter_model.safetensors")
    train(config(model="random:opt-tiny", **{**options, "learning_rate": 0.0}, overwrite_output_dir=True))
    before = load_file(tmp_path / "out/adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert all(torch.isfinite(value).all() for value in after.values())


# From the command line -------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "options",
    [
        ("--tuning", "prefix", "--num-virtual-tokens", 3),
        ("--tuning", "prompt"),
        (
            "--tuning",
            "peft",
            "--peft-type",
            "ia3",
            "--peft-config",
            '{"target_modules": ["k_proj", "v_proj", "down_proj"]}',
        ),
        ("--tuning", "head"),
    ],
    ids=lambda options: options[1],
)
def test_what_was_tuned_is_evaluated_again_from_its_folder(zotune, short, rows_file, tmp_path, options):
    said = zotune(*short(*options, "--learning-rate", 0.1, "--num-dev", 0, "--eval-file", rows_file, "--json"))
    assert said.code == 0, said.err
    trained = json.loads(said.out)
    again = zotune("eval", "--model", tmp_path / "out", "--eval-file", rows_file, "--device", "cpu", "--json")
    assert again.code == 0, again.err
    evaluated = json.loads(again.out)
    assert evaluated["accuracy"] == trained["test"]["accuracy"]
    # Under a tuned head the run computes the layers in groups, which may differ in the last bits.
    assert evaluated["loss"] == pytest.approx(trained["test"]["loss"], rel=1e-6 if "head" in options else 0)
    # The resolved configuration is a recipe that runs again.
    rerun = zotune("train", tmp_path / "out/config.yaml", "--output-dir", tmp_path / "rerun", "--json")
    assert rerun.code == 0, rerun.err
    assert json.loads(rerun.out)["test"]["loss"] == trained["test"]["loss"]


def card_model(folder):
    """What the Python lines of a model card load."""
    lines = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    base = (
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] if "BASE" in lines else ""
    )
    found = {"FOLDER": str(folder)}
    exec(lines.replace("BASE = ...", f"BASE = {base!r}"), found)
    return found["model"].eval()


@pytest.mark.sample(2)
@pytest.mark.parametrize("model", ["random:llama-tiny", "random:roberta-tiny", "folder"])
@pytest.mark.parametrize("tuning", ["full", "lora", "prompt"])
@torch.no_grad()
def test_the_lines_of_the_model_card_load_the_model(config, tiny, model, tuning, tmp_path):
    if model == "folder":
        base = tiny("opt")
        base.module.save_pretrained(tmp_path / "base")
        base.tokenizer.save_pretrained(tmp_path / "base")
        model = str(tmp_path / "base")
    words = {"yes": "Yes", "no": "No"}
    train(config(model=model, tuning=tuning, verbalizer=words, template="{text} It was", learning_rate=0.05))
    ids = torch.tensor([[0, 70, 80, 90]])
    lm = load(ModelOptions(model=str(tmp_path / "out"), device="cpu"))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(card_model(tmp_path / "out")(**inputs).logits, lm.module(**inputs).logits)


@pytest.mark.slow
def test_an_adapter_of_the_built_in_model_names_it_and_no_path(config, smollm2, tmp_path, monkeypatch):
    train(config(model="smollm2-135m", tuning="lora", tuned_layers=1, num_train=4, num_dev=2, max_steps=1))
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert load(ModelOptions(model=str(tmp_path / "out"), device="cpu")).base.name_or_path == "smollm2-135m"
    # A folder of the base's name on the Hub stands in for the Hub.
    (tmp_path / "HuggingFaceTB").mkdir()
    (tmp_path / adapter["base_model_name_or_path"]).symlink_to(fetch("smollm2-135m"))
    monkeypatch.chdir(tmp_path)
    assert sum(p.numel() for n, p in card_model(tmp_path / "out").named_parameters() if "lora" not in n) == 134_515_008
