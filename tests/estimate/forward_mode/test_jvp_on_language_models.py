"""On every family of language models and kind of tuning, coefficients are those of `torch.func.jvp` and of autograd."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

import zotune as zo

# What peft asks of transformers concerns their developers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]

COMMON = {"vocab_size": 96, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
GROUPED = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64}
CONFIGS = {
    "roberta": lambda: transformers.RobertaConfig(**COMMON, intermediate_size=24, max_position_embeddings=40),
    "opt": lambda: transformers.OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=4, n_positions=40),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=4),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GROUPED, sliding_window=4, query_pre_attn_scalar=4),
}
# The others compute their norms in single precision whatever the model's, in transformers' code.
DOUBLE_THROUGHOUT = ("roberta", "opt", "gpt2")
TUNINGS = ("full", "lora", "prefix", "prompt")
IDS = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])

each_family = pytest.mark.parametrize("family", CONFIGS)
each_tuning = pytest.mark.parametrize("tuning", TUNINGS)


def adapter(family, tuning):
    task = {"task_type": "CAUSAL_LM"} if family != "roberta" else {}
    if tuning == "lora":
        return peft.LoraConfig(r=2, target_modules="all-linear", **task)
    kind = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[tuning]
    return kind(num_virtual_tokens=3, task_type="CAUSAL_LM")


def built(family, tuning="full", dtype=torch.float32, attention="sdpa"):
    """A tiny model with weights large enough for every part of it to matter."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    auto = transformers.AutoModelForMaskedLM if family == "roberta" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention)
    if tuning != "full":
        model = peft.get_peft_model(model, adapter(family, tuning))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.to(dtype).eval()


def loss_of(model):
    logits = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide[:, -9:].flatten(0, 1), IDS.flatten())


def by_jvp(model, u):
    """The coefficient by torch's own forward mode, with the whole direction in memory."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    x = {name: model.get_parameter(name).detach() for name in names}
    tangents = {name: u.of(model, name).to(x[name].dtype) for name in names}

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return loss_of(self.model)

    def f(x):
        return torch.func.functional_call(Loss(), {f"model.{name}": t for name, t in x.items()}, ())

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return float(torch.func.jvp(f, (x,), (tangents,))[1])


def by_autograd(model, u):
    """∇f·u by back-propagation, in double precision."""
    twin = copy.deepcopy(model).double()
    loss_of(twin).backward()
    named = [(name, p) for name, p in twin.named_parameters() if p.grad is not None]
    return sum(float((p.grad * u.of(model, name).double()).sum()) for name, p in named)


def coefficient(model, u):
    estimate = zo.forward_gradient(lambda: loss_of(model), zo.ParameterSet(model), [u])
    assert estimate.num_forwards == 1
    with torch.no_grad():
        assert estimate.loss == pytest.approx(float(loss_of(model)), rel=1e-2)
    return estimate.terms[0][0]


def skip_unsupported(family, tuning):
    if family == "roberta" and tuning in ("prefix", "prompt"):
        pytest.skip("peft has no such adapter for masked language models")


@pytest.mark.sample(5)
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # peft's own call
@each_family
@each_tuning
@pytest.mark.parametrize("sampler", [zo.rademacher, zo.gaussian], ids=str)
def test_coefficient_equals_torchs_jvp_and_autograds_product_in_double_precision(family, tuning, sampler):
    skip_unsupported(family, tuning)
    model, u = built(family, tuning, torch.float64), zo.Direction(5, sampler)
    found = coefficient(model, u)
    close = {"rel": 1e-10} if family in DOUBLE_THROUGHOUT else {"rel": 1e-5, "abs": 1e-6}
    assert abs(found) > 1e-3
    assert found == pytest.approx(by_jvp(model, u), **close)
    assert found == pytest.approx(by_autograd(model, u), **close)


@pytest.mark.sample(3)
@each_family
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str
)
def test_coefficient_in_every_precision_equals_that_of_the_same_weights_in_double(family, tuning, dtype, tolerance):
    model, u = built(family, tuning, dtype), zo.Direction(5)
    expected = by_jvp(copy.deepcopy(model).double(), u)
    scale = max(abs(expected), 0.5)
    assert coefficient(model, u) == pytest.approx(expected, abs=tolerance * scale)


@each_family
def test_attention_written_out_and_fused_give_the_same_coefficient(family):
    fused, eager, u = built(family), built(family, attention="eager"), zo.Direction(5)
    assert coefficient(fused, u) == pytest.approx(coefficient(eager, u), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_under_autocast_the_coefficient_is_that_of_single_precision_to_half_precision(family):
    model, u = built(family), zo.Direction(5)
    expected = coefficient(model, u)
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        with torch.autocast("cpu", dtype=dtype):
            found = coefficient(model, u)
        assert found != expected
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.sample(2)
@each_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_check_passes_on_every_family_and_precision(family, dtype):
    model = built(family, dtype=dtype)
    estimator, tuned = zo.CheckedForwardGradient(), zo.ParameterSet(model)
    for seed in range(3):
        estimator(lambda: loss_of(model), tuned, [zo.Direction(seed)])
        estimator._is_checked = False
