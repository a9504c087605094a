"""Whatever a GGUF file holds is computed with, or refused by name."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from zotune.errors import UsageError
from zotune.llm.quantized.gguf_config import llama3_factors
from zotune.llm.quantized.gguf_model import read_model

IDS = torch.arange(12)[None] + 5
ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}


def config(kind=LlamaConfig, **more):
    return kind(vocab_size=64, hidden_size=64, head_dim=32, max_position_embeddings=128, **SIZES, **more)


def write(path, keys=(), tensors=(), without=(), arch="llama", hidden=64):
    """A file of random tensors, some packed, with further keys and tensors."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in dict(keys).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{arch}.{key}", value)
    shapes = {
        "token_embd.weight": (64, hidden),
        "output.weight": (64, hidden),
        "output_norm.weight": (hidden,),
        **{f"blk.0.{name}_norm.weight": (hidden,) for name in ("attn", "ffn")},
        **{f"blk.0.attn_{name}.weight": (32, hidden) for name in "kv"},
        **{f"blk.0.attn_{name}.weight": (64, hidden) for name in ("q", "output")},
        **{f"blk.0.ffn_{name}.weight": (64, hidden) for name in ("gate", "up", "down")},
        **({f"blk.0.attn_{name}_norm.weight": (32,) for name in "qk"} if arch == "qwen3" else {}),
    }
    for name, shape in shapes.items():
        values = (1.0 * (len(shape) == 1) + 0.3 * rng.normal(size=shape)).astype(np.float32)
        if name in without:
            continue
        if len(shape) == 1 or "output" in name:
            writer.add_tensor(name, values)
        else:
            packed = gguf.quantize(values, GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
    for name, values in dict(tensors).items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def with_frequencies(path, divisor, **more):
    """The file's model, its rotary frequencies divided here by hand."""
    model = read_model(path, config(**more), torch.float32)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq / torch.as_tensor(divisor, dtype=torch.float32)
    return logits(model)


@pytest.mark.parametrize(
    ("keys", "factors", "divisor"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, None, 8.0),
        ({"rope.scale_linear": 2.0}, None, 2.0),
        ({}, np.linspace(1, 9, 16), np.linspace(1, 9, 16)),
        ({"rope.freq_base": 5e5}, llama3_factors(32, 5e5, 32.0), llama3_factors(32, 5e5, 32.0)),
    ],
)
def test_rotary_scalings_and_factors_are_computed_with(keys, factors, divisor, tmp_path):
    plain = write(tmp_path / "plain.gguf")
    tensors = {} if factors is None else {"rope_freqs.weight": factors}
    made = config()
    found = logits(read_model(write(tmp_path / "x.gguf", keys, tensors), made, torch.float32))
    theta = (
        {"rope_parameters": {"rope_theta": keys["rope.freq_base"], "rope_type": "default"}}
        if factors is not None and keys
        else {}
    )
    assert torch.allclose(found, with_frequencies(plain, divisor, **theta), atol=1e-5)
    assert not torch.allclose(found, logits(read_model(plain, config(), torch.float32)), atol=1e-3)
    # What is saved with the configuration computes the same.
    again = read_model(plain, LlamaConfig.from_dict(made.to_dict()), torch.float32)
    if "rope.freq_base" not in keys:
        assert torch.allclose(logits(again), found, atol=1e-5)


def test_the_factors_of_llama_3_are_those_of_transformers():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = config(rope_parameters={"rope_theta": 5e5, **ROPE})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")
    plain = 1 / 5e5 ** (torch.arange(0, 32, 2) / 32)
    assert np.allclose((plain / frequencies).numpy(), llama3_factors(32, 5e5, 32.0), rtol=1e-5)


def test_yarn_has_the_parameters_of_the_file(tmp_path):
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    made = config()
    read_model(write(tmp_path / "x.gguf", keys), made, torch.float32)
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert expected.items() <= made.rope_parameters.items()


def test_gemma3_scales_its_layers_of_full_attention_alone(tmp_path):
    from zotune.llm.quantized.gguf_config import complete_config

    made = config(Gemma3TextConfig)
    local = dict(made.rope_parameters["sliding_attention"])
    complete_config(
        made, "gemma3", {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}, None, "x"
    )
    assert made.rope_parameters["full_attention"]["factor"] == 8.0
    assert made.rope_parameters["sliding_attention"] == local


def test_numbers_of_the_file_replace_those_of_the_configuration(tmp_path):
    """transformers leaves out the head size of qwen3 and takes its default, 128."""
    path = write(
        tmp_path / "x.gguf", {"attention.key_length": 32, "attention.layer_norm_rms_epsilon": 0.5}, arch="qwen3"
    )
    made = Qwen3Config(vocab_size=64, hidden_size=64, max_position_embeddings=128, **SIZES)
    model = read_model(path, made, torch.float32)
    assert made.head_dim == 32 and model.model.norm.variance_epsilon == 0.5
    logits(model)


@pytest.mark.parametrize(
    ("keys", "tensors", "without", "match"),
    [
        ({}, {"blk.0.attn_q.bias": np.ones(64)}, (), r"holds blk\.0\.attn_q\.bias, which .* does not read"),
        ({}, {"blk.1.ffn_up.weight": np.ones((64, 64))}, (), r"holds blk\.1\.ffn_up\.weight"),
        ({}, {}, ("blk.0.ffn_norm.weight",), r"does not hold blk\.0\.ffn_norm\.weight"),
        ({}, {}, ("output.weight",), r"does not hold output\.weight"),
        ({"attention.scale": 0.5}, {}, (), r"sets llama\.attention\.scale: 0\.5"),
        ({"expert_count": 8}, {}, (), r"sets llama\.expert_count: 8"),
        ({"attention.causal": False}, {}, (), r"sets llama\.attention\.causal: False"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, {}, (), r"rope\.scaling\.type: longrope"),
        ({"rope.scaling.attn_factor": 0.7}, {}, (), r"rope\.scaling\.attn_factor"),
        ({"rope.dimension_count": 16}, {}, (), r"rope\.dimension_count: 16"),
        ({"block_count": 2}, {}, (), r"block_count: 2"),
        (
            {"rope.scaling.factor": 2.0},
            {"rope_freqs.weight": np.full(16, 3.0)},
            (),
            r"rope_freqs\.weight of 16",
        ),
        ({"attention.head_count_kv": 2}, {}, (), r"attn_k\.weight of the GGUF file has the shape \(32, 64\)"),
    ],
)
def test_what_is_not_computed_with_is_refused_by_name(keys, tensors, without, match, tmp_path):
    path = write(tmp_path / "x.gguf", keys, tensors, without)
    with pytest.raises(UsageError, match=match):
        read_model(path, config(), torch.float32)


def test_a_head_in_the_file_is_not_replaced_by_the_embedding(tmp_path):
    path = write(tmp_path / "x.gguf")
    tied, untied = config(tie_word_embeddings=True), config(tie_word_embeddings=False)
    models = [read_model(path, made, torch.float32) for made in (tied, untied)]
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert not tied.tie_word_embeddings
    path = write(tmp_path / "y.gguf", without=("output.weight",))
    shared = read_model(path, config(tie_word_embeddings=True), torch.float32)
    assert not torch.allclose(logits(shared), logits(models[0]), atol=1e-3)
