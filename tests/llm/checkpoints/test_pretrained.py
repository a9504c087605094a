"""Each tensor of a checkpoint finds its place or is named; the dry run and the run read a model alike."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from zotune.errors import UsageError
from zotune.llm.checkpoints.causality import check_causal
from zotune.llm.checkpoints.model_kind import kind_of
from zotune.llm.config.step import ModelOptions
from zotune.llm.models.load import load
from zotune.llm.models.meta_model import load_meta_model
from zotune.llm.models.random_models import byte_tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS = {"vocab_size": 320, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def both(folder, labels=()):
    """How the run and the dry run read a model."""
    options = ModelOptions(model=str(folder), device="cpu")
    return [load(options, labels), load_meta_model(options, tuple(labels))[0]]


def saved(folder, model):
    model.save_pretrained(folder)
    byte_tokenizer(model.config).save_pretrained(folder)
    return folder


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(folder, **values):
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture
def folder(tmp_path, tiny):
    return saved(tmp_path / "mistral", tiny("mistral").module)


def refused(folder, match, labels=()):
    for read in (load, load_meta_model):
        with pytest.raises(UsageError, match=match):
            read(ModelOptions(model=str(folder), device="cpu"), tuple(labels))


NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: {k: v for k, v in s.items() if k != NORM}, rf"does not hold {NORM}, which"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "named module.…, as DistributedDataParallel"),
        (lambda s: {k: v for k, v in s.items() if k != "lm_head.weight"}, "not hold lm_head.weight.*no such head"),
        (lambda s: s | {"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)}, r"holds model\.layers\.2\.mlp"),
        (lambda s: s | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, "holds .*q_norm.*no place"),
        (lambda s: s | {"lm_head.bias": torch.ones(320)}, r"holds lm_head\.bias"),
        (lambda s: s | {NORM: torch.ones(31)}, rf"holds {NORM} in the shape \(31,\), .* \(32,\)"),
    ],
)
def test_a_tensor_that_is_missing_or_has_no_place_is_named(folder, change, match):
    change_tensors(folder, change)
    refused(folder, match)


def test_a_shard_that_the_index_does_not_list_is_missed(tmp_path, tiny):
    model = tiny("qwen3").module
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    byte_tokenizer(model.config).save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    gone = content["weight_map"].pop("model.layers.1.mlp.gate_proj.weight")
    file = tmp_path / gone
    save_file({k: v for k, v in load_file(file).items() if "1.mlp.gate" not in k}, file, metadata={"format": "pt"})
    index.write_text(json.dumps(content))
    refused(tmp_path, r"does not hold model\.layers\.1\.mlp\.gate_proj\.weight")
    (tmp_path / gone).unlink()
    refused(tmp_path, "does not hold a model that transformers can load")


def test_another_head_is_left_out_with_a_line(folder, capsys):
    change_tensors(folder, lambda s: s | {"v_head.summary.weight": torch.ones(1, 32)})
    run, dry = both(folder)
    assert type(run.module) is type(dry.module)
    assert capsys.readouterr().err.count("also holds v_head.summary.weight: another head") == 1


def test_a_pointer_of_git_lfs_is_no_model(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    refused(folder, "is a pointer of git-lfs.*git lfs pull")


ENCODERS = {
    "electra": transformers.ElectraForPreTraining,
    "camembert": transformers.CamembertModel,
    "roformer": transformers.RoFormerForMultipleChoice,
    "megatron-bert": transformers.MegatronBertForNextSentencePrediction,
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_never_read_as_causal(name, tmp_path):
    cls = ENCODERS[name]
    config = cls.config_class(**SIZES, **TOKENS, max_position_embeddings=64)
    saved(tmp_path, cls(config))
    assert kind_of(config, name).masked
    # It has no head to fill in masks with, and none is drawn.
    refused(tmp_path, "does not hold .* a masked language model .* no such head")
    # A new head for classes needs the body alone.
    run, dry = both(tmp_path, ("a", "b"))
    assert run.classifies and dry.classifies


@pytest.mark.parametrize("architectures", [["RoFormerForMaskedLM"], ["RoFormerForCausalLM"], None])
def test_attention_decides_and_not_the_architecture(architectures, tmp_path):
    config = transformers.RoFormerConfig(**SIZES, **TOKENS, max_position_embeddings=64)
    saved(tmp_path, transformers.RoFormerForMaskedLM(config))
    change_config(tmp_path, architectures=architectures)
    assert [lm.masked for lm in both(tmp_path)] == [True, True]
    change_config(tmp_path, is_decoder=True)
    assert [lm.masked for lm in both(tmp_path)] == [False, False]


def test_a_decoder_that_sees_later_tokens_is_refused(tmp_path, tiny):
    saved(tmp_path, tiny("gemma3").module)
    change_config(tmp_path, use_bidirectional_attention=True)
    refused(tmp_path, "use_bidirectional_attention: each position sees those after it")
    xlnet = transformers.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=32, vocab_size=320)
    saved(tmp_path / "xlnet", transformers.XLNetLMHeadModel(xlnet))
    refused(tmp_path / "xlnet", 'attn_type: "bi"')


def test_causality_is_tried_on_the_model_itself(tiny):
    lm = tiny("llama")
    read = lambda ids: lm.module(ids).logits  # noqa: E731
    check_causal(read, lm.vocabulary, "llama")
    with pytest.raises(UsageError, match="depends on the tokens after it"):
        check_causal(lambda ids: read(ids.flip(1)).flip(1), lm.vocabulary, "a reversed model")


@pytest.mark.parametrize("cls", [transformers.BartForConditionalGeneration, transformers.T5ForConditionalGeneration])
def test_encoder_decoders_are_refused(cls):
    with pytest.raises(UsageError, match="is an encoder-decoder"):
        kind_of(cls.config_class(architectures=[cls.__name__]), "x")


@pytest.mark.parametrize("family", ["XLMRoberta", "Camembert", "Longformer", "MPNet", "Bert"])
def test_the_context_is_the_longest_sequence_that_can_be_read(family, tmp_path):
    sizes = {**SIZES, "attention_window": 8} if family == "Longformer" else SIZES
    config = getattr(transformers, f"{family}Config")(**sizes, **TOKENS, max_position_embeddings=40)
    saved(tmp_path, getattr(transformers, f"{family}ForMaskedLM")(config))
    run, dry = both(tmp_path)
    assert run.context == dry.context == (40 if family == "Bert" else 38)
    run.module(torch.full((1, run.context), 7))
    with pytest.raises((IndexError, RuntimeError)):
        run.module(torch.full((1, run.context + 1), 7))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "tuning", ["lora", "prefix", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "prompt"))]
)
def test_composite_configurations_are_read(tuning, tmp_path, tiny, config):
    from zotune.llm.training.train import train
    from zotune.plan.dry_run import dry_run

    text = tiny("gemma3").config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(whole)
    model.save_pretrained(tmp_path / "g3")
    byte_tokenizer(text).save_pretrained(tmp_path / "g3")
    assert [lm.context for lm in both(tmp_path / "g3")] == [512, 512]
    options = config(model=str(tmp_path / "g3"), tuning=tuning)
    assert train(options).num_tuned == dry_run(options).num_tuned


DAMAGED = {
    "model.safetensors.index.json": [
        "",
        "[]",
        "3",
        '{"weight_map": 1}',
        '{"weight_map": {"a": 1, "b": "c"}}',
        "[" * 9999,
    ],
    "config.json": [
        '{"architectures": [3]}',
        '{"hidden_size": "x"}',
        '{"num_attention_heads": 0}',
        '{"rope_parameters": 7}',
    ],
    "tokenizer_config.json": ['{"model_max_length": "x"}', '{"bos_token": 5}', "[]", '{"added_tokens_decoder": 1}'],
    "tokenizer.json": ["{}", '{"model": {"type": "BPE"}}', "\0"],
    "generation_config.json": ["[", "3"],
}


@pytest.mark.sample(8)
@pytest.mark.parametrize(("name", "content"), [(name, c) for name, all_ in DAMAGED.items() for c in all_])
def test_a_damaged_file_of_a_model_is_an_error_in_words(tmp_path, zotune, rows_file, tiny, name, content):
    lm = tiny("llama")
    lm.module.save_pretrained(tmp_path / "m", max_shard_size="50KB" if "index" in name else "1GB")
    lm.tokenizer.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / name
    if name == "config.json":
        content = json.dumps({**json.loads(path.read_text()), **json.loads(content)})
    path.write_text(content)
    said = zotune("eval", "--model", tmp_path / "m", "--eval-file", rows_file, "--device", "cpu")
    assert said.code == 2, said
    assert said.err.startswith("zotune: ")
    assert "Traceback" not in said.err
