"""Exactly the parameters that were asked for are tuned; a fresh adapter changes nothing."""

import re

import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers.pytorch_utils import Conv1D

from model_families import FAMILIES, MASKED, tiny_model
from zotune.errors import UsageError
from zotune.llm.config.run import TrainConfig
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.load import quiet_libraries
from zotune.llm.models.random_models import byte_tokenizer
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.quantized import backends

EMBEDDINGS = {
    "llama": {"model.embed_tokens.weight"},
    "opt": {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
    "roberta": {
        "roberta.embeddings.word_embeddings.weight",
        "roberta.embeddings.token_type_embeddings.weight",
        "roberta.embeddings.position_embeddings.weight",
        "roberta.embeddings.LayerNorm.weight",
        "roberta.embeddings.LayerNorm.bias",
    },
}
EMBEDDINGS |= dict.fromkeys(("mistral", "qwen3", "gemma3"), EMBEDDINGS["llama"])
LAYERS = {
    "llama": "model.layers.",
    "mistral": "model.layers.",
    "qwen3": "model.layers.",
    "gemma3": "model.layers.",
    "opt": "model.decoder.layers.",
    "roberta": "roberta.encoder.layer.",
}
# What comes after the layers; a head tied to the embeddings is an embedding.
ABOVE = {
    "llama": {"model.norm.weight", "lm_head.weight"},
    "mistral": {"model.norm.weight", "lm_head.weight"},
    "qwen3": {"model.norm.weight"},
    "gemma3": {"model.norm.weight"},
    "opt": {"model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"},
    "roberta": {
        "lm_head.bias",
        "lm_head.dense.weight",
        "lm_head.dense.bias",
        "lm_head.layer_norm.weight",
        "lm_head.layer_norm.bias",
    },
}
PROJECTIONS = {"roberta": ("attention.self.query", "attention.self.value")}


def prepared(lm, **options):
    """The names of the parameters that are tuned."""
    prepare_tuning(lm, TrainConfig.model_validate({"task": "sst2", **options}))
    return {name for name, p in lm.module.named_parameters() if p.requires_grad}


def test_full_tuning_is_all_of_the_model(tiny, family):
    lm = tiny(family)
    names = {name for name, _ in lm.module.named_parameters()}
    assert EMBEDDINGS[family] | ABOVE[family] | {n for n in names if n.startswith(LAYERS[family])} == names
    assert prepared(lm) == names


def test_tuned_layers_are_the_last_ones_and_what_lies_above(tiny, family):
    lm = tiny(family)
    names = {name for name, _ in lm.module.named_parameters()}
    last = {n for n in names if n.startswith(f"{LAYERS[family]}1.")}
    assert prepared(lm, tuned_layers=1) == last | ABOVE[family]
    assert prepared(lm, tuned_layers=2) == names - EMBEDDINGS[family]
    assert prepared(lm) == names


def test_tuned_parameters_are_those_whose_name_is_found(tiny, causal_family):
    lm = tiny(causal_family)
    names = {name for name, _ in lm.module.named_parameters()}
    pattern = r"layers\.\d+\..*norm"
    norms = {n for n in names if "norm" in n and "layers." in n}
    assert prepared(lm, tuned_parameters=pattern) == norms
    assert prepared(lm, tuned_parameters=pattern, tuned_layers=1) == {n for n in norms if ".layers.1." in n}
    assert prepared(lm, tuned_parameters=r"^model.*embed_tokens") == {n for n in names if "embed_tokens" in n}


def adapter_names(family, layers, modules):
    prefix = f"base_model.model.{LAYERS[family]}"
    return {f"{prefix}{i}.{m}.lora_{ab}.default.weight" for i in layers for m in modules for ab in "AB"}


def test_lora_tunes_query_and_value_and_nothing_else(tiny, family):
    modules = PROJECTIONS.get(family, ("self_attn.q_proj", "self_attn.v_proj"))
    assert prepared(tiny(family), tuning="lora") == adapter_names(family, (0, 1), modules)
    assert prepared(tiny(family), tuning="lora", tuned_layers=1) == adapter_names(family, (1,), modules)


def test_all_linear_means_the_layers_that_peft_means(tiny, causal_family):
    from peft import LoraConfig, get_peft_model

    ours = prepared(tiny(causal_family), tuning="lora", lora_target_modules=("all-linear",))
    theirs = get_peft_model(tiny(causal_family).base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert ours == {n for n, p in theirs.named_parameters() if p.requires_grad}


def of_family(family):
    quiet_libraries()
    module = tiny_model(family)
    module.name_or_path = family
    return LanguageModel(module, byte_tokenizer(module.config), family, family in MASKED)


def adapted(module):
    return {n.partition(".lora_")[0].removeprefix("base_model.model.") for n, p in module.named_parameters()
            if p.requires_grad}  # fmt: skip


@pytest.mark.sample(20)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_layers_that_lora_adapts_by_default(family):
    """Queries and values where they have layers of their own, else what peft chooses, else every linear layer."""
    from peft import LoraConfig, get_peft_model

    lm = of_family(family)
    linear = {n: m for n, m in lm.base.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    last = {n.rpartition(".")[2] for n in linear}
    prepared(lm, tuning="lora", lora_r=2)
    chosen = adapted(lm.module)
    pair = next((pair for pair in (("q_proj", "v_proj"), ("query", "value")) if set(pair) <= last), None)
    if pair:
        assert chosen == {n for n in linear if n.rpartition(".")[2] in pair}
    else:
        own = {"mamba": ["in_proj", "x_proj"], "mamba2": ["in_proj"], "deepseek_v3": ["q_b_proj", "kv_b_proj"]}
        mapped = lm.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        options = {"target_modules": own.get(family, None if mapped else "all-linear"), "r": 2}
        options["fan_in_fan_out"] = any(isinstance(m, Conv1D) for m in linear.values())
        theirs = get_peft_model(tiny_model(family), LoraConfig(**options, task_type=None if lm.masked else "CAUSAL_LM"))
        assert chosen == {n for n in adapted(theirs) if re.search(r"\d", n)}  # peft also adapts the head of an encoder
    ids = torch.arange(3, 9)[None]
    plain = of_family(family).read(ids, torch.ones_like(ids))
    torch.testing.assert_close(lm.read(ids, torch.ones_like(ids)), plain, rtol=0, atol=0)


def test_lora_of_a_composite_model_tunes_the_layers_asked_for(tiny):
    text = tiny("gemma3").config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    for targets, names in (((), ("q_proj", "v_proj")), (("o_proj",), ("o_proj",))):
        module = transformers.AutoModelForCausalLM.from_config(whole)
        lm = LanguageModel(module, byte_tokenizer(text), "composite", False)
        prepared(lm, tuning="lora", tuned_layers=1, lora_target_modules=targets)
        assert {n.split("layers.")[1] for n in adapted(lm.module)} == {f"1.self_attn.{name}" for name in names}
        assert all("vision" not in n for n in adapted(lm.module))


def test_what_peft_refuses_is_refused_in_words():
    with pytest.raises(UsageError, match=r"cannot add a LoRA adapter to mamba.*out_proj"):
        prepared(of_family("mamba"), tuning="lora", lora_target_modules=("out_proj",))


def test_lora_takes_rank_scale_and_modules(tiny):
    lm = tiny("llama")
    options = {"tuning": "lora", "lora_r": 3, "lora_alpha": 12, "lora_target_modules": ("down_proj",)}
    assert prepared(lm, **options) == adapter_names("llama", (0, 1), ("mlp.down_proj",))
    module = lm.base.model.layers[0].mlp.down_proj
    assert module.lora_A["default"].weight.shape == (3, 64)
    assert module.lora_B["default"].weight.shape == (32, 3)
    assert module.scaling["default"] == 4.0
    # Base plus scaled product, and nothing in between.
    torch.nn.init.normal_(module.lora_B["default"].weight)
    x = torch.randn(2, 64)
    product = x @ module.lora_A["default"].weight.T @ module.lora_B["default"].weight.T
    torch.testing.assert_close(module(x), module.base_layer(x) + 4.0 * product)
    assert not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in lm.module.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_is_float32_and_leaves_every_bit_of_the_output(tiny, family, dtype):
    lm = tiny(family, dtype)
    ids = torch.tensor([[0, 70, 80, 90, 75, 60]])
    with torch.no_grad():
        base = lm.module(input_ids=ids).logits
        tuned = prepared(lm, tuning="lora")
        assert torch.equal(lm.module(input_ids=ids).logits, base)
    dtypes = {name: p.dtype for name, p in lm.module.named_parameters()}
    assert {dtypes[name] for name in tuned} == {torch.float32}
    assert {t for name, t in dtypes.items() if name not in tuned} == {getattr(torch, dtype)}
    assert not lm.module.training


def test_an_adapters_first_weights_follow_the_seed_and_not_the_global_random_state(tiny):
    def adapter(seed):
        lm = tiny("llama")
        torch.manual_seed(len(made))
        before = torch.get_rng_state()
        prepared(lm, tuning="lora", seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([p.flatten() for n, p in lm.module.named_parameters() if "lora_A" in n])

    made = []
    for seed in (1, 1, 2):
        made.append(adapter(seed))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_the_end_of_a_path_names_linear_layers_as_for_peft(tiny):
    names = prepared(tiny("llama"), tuning="lora", lora_target_modules=("self_attn.o_proj", "up_proj"))
    paths = {name.split(".lora_")[0].removeprefix("base_model.model.model.") for name in names}
    assert paths == {f"layers.{i}.{end}" for i in range(2) for end in ("self_attn.o_proj", "mlp.up_proj")}
    refused = ((("attn.o_proj",), "no linear layer 'attn.o_proj'"), (("all-linear", "q_proj"), "stands alone"))
    for targets, match in refused:
        with pytest.raises(UsageError, match=match):
            prepared(tiny("llama"), tuning="lora", lora_target_modules=targets)


def test_what_does_not_exist_is_suggested_or_named(tiny):
    lm = tiny("llama")
    with pytest.raises(UsageError, match=r"no linear layer 'q_porj'\. Did you mean 'q_proj'"):
        prepared(lm, tuning="lora", lora_target_modules=("v_proj", "q_porj"))
    with pytest.raises(UsageError, match="tuned_layers is 3, but the model has 2 layers"):
        prepared(lm, tuned_layers=3)
    with pytest.raises(UsageError, match="tuned_layers is 3, but the model has 2 layers"):
        prepared(lm, tuned_layers=3, tuning="lora")
    with pytest.raises(UsageError, match=r"no regular expression: '\('"):
        prepared(lm, tuned_parameters="(")


def test_tuning_nothing_is_refused_with_examples_of_names(tiny):
    with pytest.raises(UsageError, match=r"nothing would be tuned.*'bias'.*'lm_head.weight'"):
        prepared(tiny("llama"), tuned_parameters="bias")
    with pytest.raises(UsageError, match="nothing would be tuned"):
        prepared(tiny("llama"), tuned_parameters="embed_tokens", tuned_layers=1)


def test_each_weight_is_looked_at_a_few_times_however_many_there_are(tiny, monkeypatch):
    """So that to choose among the thousands of weights of a deep model takes no time."""
    lm, looks, is_packed = tiny("llama"), [], backends.is_packed
    monkeypatch.setattr(backends, "is_packed", lambda p: (looks.append(p), is_packed(p))[1])
    prepare_tuning(lm, TrainConfig.model_validate({"task": "sst2"}))
    num_weights = len([*lm.module.parameters()])
    assert num_weights <= len(looks) <= 3 * num_weights
