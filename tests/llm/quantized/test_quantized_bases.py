"""Quantised bases: packed integers stay, numbers are those of an independent dequantisation, steps and ledgers hold."""

import hashlib
import importlib.util
import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zotune as zo
from zotune.errors import UnreadTensorError, UsageError
from zotune.llm.config.run import EvalConfig
from zotune.llm.config.step import ModelOptions
from zotune.llm.ledger.rebuild import export, find_ledger, rebuild
from zotune.llm.ledger.verify import verify
from zotune.llm.models.load import load
from zotune.llm.quantized.backends import frozen_tensors
from zotune.llm.quantized.gguf_blocks import FORMATS
from zotune.llm.quantized.gguf_reader import read_gguf
from zotune.llm.quantized.layers import PackedEmbedding, PackedLinear, unpack_scales
from zotune.llm.training.evaluation import evaluate
from zotune.llm.training.origin import frozen_digest
from zotune.llm.training.train import train
from zotune.plan.dry_run import dry_run

# bitsandbytes and torchao are not among the packages that tests need; where they are installed they are tried.
LIBRARIES = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"no {package}"))
    for name, package in (
        ("bnb-nf4", "bitsandbytes"),
        ("bnb-int8", "bitsandbytes"),
        ("torchao-int8", "torchao"),
        ("torchao-int4", "torchao"),
    )
]
IDS = torch.arange(24).view(2, 12) + 20


def blocks_of(kind, rows, count, seed=0):
    """(rows, bytes) of random blocks, their float16 scales and minima sound numbers."""
    form = FORMATS[kind]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows * count, form.bytes), dtype=np.uint8)
    halves = {form.scale_at} | ({2} if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else set())
    for at in halves:
        data[:, at : at + 2] = (0.01 * rng.normal(size=(len(data), 1))).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of llama's architecture, of widths that blocks of 32 and 64 go into."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from zotune.llm.models.random_models import byte_tokenizer

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    path = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gguf_model(folder):
    """The same model as a GGUF file of Q4_1, Q4_0 and Q8_0, and as transformers has it, dequantised by NumPy."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_array("some.numbers", [1, 2, 3])
    state = model.state_dict()
    for name, value in state.items():
        head, _, attribute = name.rpartition(".")
        stored, numbers = f"{names.get_name(head)}.{attribute}", value.numpy()
        if value.dim() == 1:
            writer.add_tensor(stored, numbers)
            continue
        kind = "Q8_0" if "embed" in name else "Q4_0" if "down_proj" in name else "Q4_1"
        if "q_proj" in name or "k_proj" in name:  # the file has a head's pairs of rows side by side
            heads = 4 if "q_proj" in name else 2
            numbers = numbers.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(numbers.shape)
        packed = gguf.quantize(numbers, GGMLQuantizationType[kind])
        writer.add_tensor(stored, packed, raw_dtype=GGMLQuantizationType[kind])
        back = gguf.dequantize(packed, GGMLQuantizationType[kind])
        if "q_proj" in name or "k_proj" in name:
            back = back.reshape(heads, -1, 2, 64).swapaxes(1, 2).reshape(back.shape)
        state[name] = torch.from_numpy(np.ascontiguousarray(back))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(state)
    return path, model.eval()


@pytest.fixture
def base(folder, gguf_model, monkeypatch):
    """A function: quantisation to the options of the tiny model that are not the defaults."""
    import transformers

    from zotune.llm.models import load as models

    # A GGUF file's own configuration and tokenizer are transformers' to read; here they are the folder's.
    for auto in (transformers.AutoConfig, transformers.AutoTokenizer):
        plain = auto.from_pretrained

        def read(name, *args, plain=plain, gguf_file=None, **kwargs):
            return plain(name, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", read)
    assert models.load

    def options(name):
        if name == "gguf":
            return {"model": str(gguf_model[0]), "quantization": None}
        return {"model": str(folder), "quantization": name}

    return options


def bits(tensors):
    return {n: hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy()).digest() for n, t in tensors.items()}


ALL = ["gguf", *LIBRARIES]
# One way of storing a base of each origin in `make test`, the others in `make test-slow`.
FEW = ["gguf", LIBRARIES[0], LIBRARIES[2]]
FEW += [pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow]) for case in (LIBRARIES[1], LIBRARIES[3])]


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_has_the_bits_of_the_gguf_package(kind):
    packed = blocks_of(kind, rows=5, count=3)
    expected = gguf.dequantize(packed, GGMLQuantizationType[kind])
    found = FORMATS[kind].dequantised(torch.from_numpy(packed)).numpy()
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", FORMATS)
def test_unpacked_scales_scale_their_blocks_and_are_the_files_numbers_at_first(kind):
    packed = torch.from_numpy(blocks_of(kind, rows=6, count=2))
    layer = PackedLinear(nn.Parameter(packed, requires_grad=False), FORMATS[kind], torch.float32, None)
    before = layer.dequantised()
    unpack_scales([layer])
    assert torch.equal(layer.dequantised(), before)
    with torch.no_grad():
        factors = torch.rand_like(layer.scales) + 0.5
        layer.scales.mul_(factors)
        layer.scales[0, 0].mul_(-1)  # a block that would be turned over is read as zeros
        factors[0, 0] = 0
    assert torch.allclose(layer.dequantised(), before * factors.repeat_interleave(FORMATS[kind].numbers, dim=1))


def test_a_packed_embedding_gives_the_rows_of_its_table():
    packed = torch.from_numpy(blocks_of("Q6_K", rows=9, count=1))
    layer = PackedEmbedding(nn.Parameter(packed, requires_grad=False), FORMATS["Q6_K"], torch.float32)
    ids = torch.tensor([[3, 8], [0, 3]])
    assert torch.equal(layer(ids), layer.dequantised()[ids])


def test_a_gguf_files_logits_are_those_of_the_dequantised_model_to_the_bit(base, gguf_model):
    lm = load(ModelOptions(**base("gguf"), device="cpu"))
    with torch.no_grad():
        assert torch.equal(lm.module(IDS).logits, gguf_model[1](IDS).logits)


def test_no_tensor_as_large_as_a_matrix_of_numbers_is_made_but_in_pieces(base, monkeypatch):
    from zotune.llm.quantized import layers as packed

    monkeypatch.setattr(packed, "piece_elements", lambda device: 1024)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            self.numel = max([self.numel, *(t.numel() for t in made)])
            return out

    lm = load(ModelOptions(**base("gguf"), device="cpu"))
    with torch.no_grad(), Largest() as largest:
        lm.module(IDS[:1, :4], logits_to_keep=1)
    assert largest.numel < 64 * 64  # the smallest square matrix; the embedding has 320 × 64


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ALL)
def test_an_adapter_is_tuned_and_its_base_keeps_its_bits(name, base, config):
    options = config(**base(name), tuning="lora", learning_rate=1e-2, max_steps=3)
    before = bits(frozen_tensors(load(options).module))
    result = train(options)
    ledger = find_ledger(result.output_dir)
    rebuilt = rebuild(ledger)  # which compares the digest of all that is frozen
    after = bits(frozen_tensors(rebuilt.lm.module))
    assert set(before.values()) <= set(after.values())
    found = verify(result.output_dir)
    assert (found.num_steps, found.different) == (3, ())
    assert found.num_tensors == 12


@pytest.mark.parametrize("name", ALL)
def test_the_digest_of_a_base_sees_each_of_its_packed_tensors(name, base):
    """Integers and scales alike: each tensor of a layer is changed in turn."""
    lm = load(ModelOptions(**base(name), device="cpu"))
    seen = {frozen_digest(lm.module)}
    layer = lm.module.model.layers[1].self_attn.v_proj
    parts = [layer.weight] if name == "gguf" else []
    if name == "bnb-nf4":
        parts = [layer.weight, layer.weight.quant_state.absmax]
    if name == "bnb-int8":
        layer.init_8bit_state()
        parts = [layer.weight, layer.state.SCB]
    if name.startswith("torchao"):
        parts = [getattr(layer.weight, part) for part in layer.weight.__tensor_flatten__()[0]]
    with torch.no_grad():
        for part in parts:
            part.data.view(-1)[0] += 1
            seen.add(frozen_digest(lm.module))
    assert len(seen) == 1 + len(parts) > 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", FEW)
def test_an_evaluation_of_a_tuned_adapter_is_on_the_base_it_was_tuned_on(name, base, config, rows_file):
    result = train(config(**base(name), tuning="lora", learning_rate=1e-2))
    lm = load(ModelOptions(model=str(result.output_dir), device="cpu"))
    kept = json.loads((result.output_dir / "adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == base(name)["model"]
    ours, theirs = (frozen_tensors(m) for m in (lm.module, load(ModelOptions(**base(name), device="cpu")).module))
    assert set(bits(theirs).values()) <= set(bits(ours).values())
    found, _ = evaluate(EvalConfig(model=str(result.output_dir), eval_file=rows_file, device="cpu", baselines=True))
    assert found["rows"].base == base(name)["model"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["gguf", *LIBRARIES[:2]])
def test_scales_are_tuned_and_packed_integers_are_not(name, base, config):
    options = config(**base(name), tuning="scales", learning_rate=1e-7, mu=1e-5, max_steps=3)
    result = train(options)
    base_lm, tuned = load(options), load(ModelOptions(model=str(result.output_dir), device="cpu"))
    before, after = dict(base_lm.module.named_parameters()), dict(tuned.module.named_parameters())
    for key, p in before.items():
        assert torch.equal(p.data, after[key].data), key
    with torch.no_grad():
        one, other = base_lm.module(IDS).logits, tuned.module(IDS).logits
    assert not torch.equal(one, other)
    assert torch.allclose(one, other, atol=0.1)
    assert verify(result.output_dir).different == ()


@pytest.mark.parametrize("name", ["gguf", *LIBRARIES[:2]])
def test_a_step_on_scales_is_that_of_the_plain_formula(name, base, config):
    """Against weights that are dequantised here, their scales moved by hand."""
    from zotune.llm.models.tuned_parameters import prepare_tuning

    options = config(**base(name), tuning="scales", tuned_layers=1, mu=1e-4)
    lm = load(options)
    prepare_tuning(lm, options)
    opt = zo.zo_sgd(lm.module, lr=1e-3, mu=1e-4, seed=5)
    closure = lambda: lm.module(IDS, labels=IDS).loss  # noqa: E731
    scales = {t.name: t.parameter.detach().clone() for t in opt.tuned}
    (u,) = opt.directions()

    def loss_at(a):
        for t in opt.tuned:
            t.parameter.data.copy_(scales[t.name] + a * u.of(opt.tuned, t.name))
        with torch.no_grad():
            return float(closure())

    c = (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4
    loss_at(0.0)
    opt.step(closure)
    for t in opt.tuned:
        expected = scales[t.name] - 1e-3 * c * u.of(opt.tuned, t.name)
        assert torch.allclose(t.parameter, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_whole_tuning_of_packed_weights_is_refused_by_name(name, base, config):
    with pytest.raises(UsageError, match=r"tuning: full would tune model\.\S+"):
        train(config(**base(name)))
    with pytest.raises(UsageError, match=r"q_proj\.weight, whose values are packed integers .*--tuning lora"):
        train(config(**base(name), tuned_parameters="q_proj"))


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", FEW)
def test_norms_of_a_quantised_base_are_tuned(name, base, config):
    result = train(config(**base(name), tuned_parameters="norm", learning_rate=1e-3, max_steps=2))
    assert result.num_tuned == 7 * 64
    lm = load(ModelOptions(model=str(result.output_dir), device="cpu"))
    norms = {n: p for n, p in lm.module.named_parameters() if "norm" in n}
    assert all(not torch.equal(p, torch.ones_like(p)) for p in norms.values())
    assert verify(result.output_dir).different == ()


@pytest.mark.sample(2)
@pytest.mark.parametrize("tuning", ["prefix", "prompt"])
@pytest.mark.parametrize("name", FEW)
def test_virtual_tokens_go_before_a_quantised_model(name, tuning, base, config):
    result = train(config(**base(name), tuning=tuning, learning_rate=1e-2))
    assert verify(result.output_dir).different == ()


@pytest.mark.parametrize(
    "method",
    ["zo_sgd_cons", "zo_adam", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zo_sgd_sign", "zo_sgd_mmt"))],
)
def test_every_method_steps_on_a_gguf_base(method, base, config):
    result = train(config(**base("gguf"), tuning="scales", method=method, learning_rate=1e-6, mu=1e-5))
    assert (result.num_steps, result.num_skipped) == (2, 0)
    assert verify(result.output_dir).different == ()


@pytest.mark.sample(3)
@pytest.mark.parametrize("tuning", ["lora", "scales"])
@pytest.mark.parametrize("name", ALL)
def test_a_merged_export_computes_what_the_tuned_model_does(name, tuning, base, config, tmp_path):
    from transformers import AutoModelForCausalLM

    if tuning == "scales" and name.startswith("torchao"):
        pytest.skip("its scales cannot be tuned")
    rates = {"learning_rate": 1e-2} if tuning == "lora" else {"learning_rate": 1e-7, "mu": 1e-5}
    result = train(config(**base(name), **rates, tuning=tuning, max_steps=3))
    export(rebuild(find_ledger(result.output_dir)), tmp_path / "dense", merged=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert all(p.is_floating_point() for p in plain.parameters())
    tuned = load(ModelOptions(model=str(result.output_dir), device="cpu"))
    with torch.no_grad():
        expected, found = tuned.module(IDS).logits, plain(IDS).logits
    # int8 of bitsandbytes rounds activations to 8 bits too, and torchao's int4 those of 8.
    tolerance = 0.05 if name in ("bnb-int8", "torchao-int4") else 1e-5
    assert (expected - found).abs().max() < tolerance


def test_a_run_that_is_resumed_gives_the_same_scales(base, config, tmp_path):
    options = {**base("gguf"), "tuning": "scales", "learning_rate": 1e-7, "mu": 1e-5}
    whole = train(config(**options, max_steps=4, output_dir=tmp_path / "whole"))
    train(config(**options, max_steps=2, output_dir=tmp_path / "parts"))
    parts = train(config(**options, max_steps=4, output_dir=tmp_path / "parts", resume=True))
    one, other = ((r.output_dir / "tuned_model.safetensors").read_bytes() for r in (whole, parts))
    assert one == other


def test_a_mu_that_would_wipe_blocks_out_is_refused(base, config):
    with pytest.raises(
        UsageError, match=r"mu is 0.001, but half of the scales of \S+ are below 0\.000\d+.*at most 1e-05"
    ):
        train(config(**base("gguf"), tuning="scales", mu=1e-3))


def test_scales_of_torchao_are_refused(base, config):
    pytest.importorskip("torchao")
    with pytest.raises(UsageError, match="scales needs a base that stores its scales as floating-point numbers"):
        train(config(**base("torchao-int8"), tuning="scales"))


def test_a_wrapper_of_integers_is_not_tuned_by_the_library():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(UsageError, match=r"'0\.weight' is a Int8Tensor"):
        zo.zo_sgd(model, lr=0.1, params=[model[0].weight])


def test_scales_that_no_forward_pass_reads_are_an_error():
    packed = torch.from_numpy(blocks_of("Q4_0", rows=6, count=2))
    layer = PackedLinear(nn.Parameter(packed, requires_grad=False), FORMATS["Q4_0"], torch.float32, None)
    unpack_scales([layer])
    layer.scales.requires_grad_(True)
    weight = layer.dequantised()
    with pytest.raises(UnreadTensorError):
        zo.zo_sgd(layer, lr=0.1).step(lambda: weight.sum())


def test_what_cannot_be_had_quantised_is_refused(base, config, tmp_path):
    with pytest.raises(UsageError, match="needs a built-in model or the path of a GGUF file"):
        load(ModelOptions(model="org/name", quantization="gguf"))
    with pytest.raises(UsageError, match="is a quantised file already"):
        load(ModelOptions(**base("gguf") | {"quantization": "bnb-nf4"}))
    with pytest.raises(UsageError, match="has no checkpoint file for bitsandbytes to quantise"):
        load(ModelOptions(model="random:llama-tiny", quantization="bnb-nf4"))


def test_a_missing_library_is_named(monkeypatch, base):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    with pytest.raises(UsageError, match="needs torchao, which is not installed: pip install torchao"):
        load(ModelOptions(**base("torchao-int8")))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"GGUF\x03\x00", "no GGUF file"), (b"PK\x03\x04" + bytes(60), "no GGUF file"), (None, "is truncated")],
)
def test_a_damaged_gguf_file_is_named(content, message, gguf_model, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_model[0].read_bytes()[:-5000] if content is None else content)
    with pytest.raises(UsageError, match=message):
        read_gguf(path)


def test_a_dry_run_knows_the_size_of_packed_weights(base, config):
    packed = dry_run(config(**base("gguf"), tuning="lora"))
    dense = dry_run(config(**base("none"), tuning="lora"))
    assert packed.memory.weights < 0.4 * dense.memory.weights
