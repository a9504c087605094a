"""A row's scores and its generated text do not depend on the other rows of its batch: each model against rows alone."""

import copy

import pytest
import torch
import transformers

from zotune.llm.config.run import TrainConfig
from zotune.llm.data.collator import collate
from zotune.llm.data.examples import Example
from zotune.llm.data.padding import LEFT_PADDED, MASKED, by_length
from zotune.llm.data.tokenization import Encoder
from zotune.llm.models.activation_cache import SequenceCache
from zotune.llm.models.activation_storage.tiers import ActivationStore
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.models.random_models import ARCHITECTURES, byte_tokenizer
from zotune.llm.models.tuned_parameters import prepare_tuning
from zotune.llm.scoring.generation import generate

COMMON = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"intermediate_size": 64, "max_position_embeddings": 256, "pad_token_id": 1, "bos_token_id": 0}
COMMON |= {"eos_token_id": 2}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_local_experts": 4}
HEADS = {**GROUPED, "head_dim": 8}

CAUSAL = {
    "gpt2": OLD, "gpt_neox": {}, "gptj": {**OLD, "rotary_dim": 4}, "bloom": {"n_layer": 2, "n_head": 4}, "falcon": {},
    "phi": {}, "phi3": {}, "qwen2": GROUPED, "gemma": HEADS, "gemma2": {**HEADS, "sliding_window": 8},
    "gemma3_text": {**HEADS, "sliding_window": 8}, "cohere": GROUPED, "mixtral": EXPERTS, "olmo2": {},
    "qwen2_moe": {**GROUPED, "moe_intermediate_size": 16, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "starcoder2": GROUPED, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "granite": {"logits_scaling": 4.0}, "smollm3": GROUPED, "mamba": {}, "falcon_mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}, "biogpt": {},
    "codegen": {**OLD, "rotary_dim": 4}, "gpt_bigcode": OLD, "llama": GROUPED, "qwen3": HEADS,
    "mistral": {**GROUPED, "sliding_window": 8},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "gpt_oss": {**EXPERTS, "head_dim": 8, "num_experts_per_tok": 2, "sliding_window": 8},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        **HEADS, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "num_experts": 4,
        "linear_num_value_heads": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"],
    },
    "qwen3_moe": {**HEADS, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "bamba": {**GROUPED, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2}, "jetmoe": {**EXPERTS, "kv_channels": 8},
    "llama4_text": {**HEADS, "num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 64},
    "granitemoe": EXPERTS, "exaone4": {**GROUPED, "sliding_window": 8, "sliding_window_pattern": 2},
    "minimax": {**EXPERTS, "block_size": 8}, "nemotron": GROUPED, "persimmon": {},
}  # fmt: skip
SMALL = {"emb_dim": 32, "n_layers": 2, "n_heads": 4}
ENCODERS = {
    "bert": {}, "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, "roberta": {},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16}, "xlm-roberta": {}, "modernbert": {"cls_token_id": 0, "sep_token_id": 2},
    "mpnet": {}, "camembert": {}, "longformer": {"attention_window": 8}, "roformer": {},
    "squeezebert": {"embedding_size": 32}, "rembert": {}, "megatron-bert": {}, "ernie": {},
    "esm": {"mask_token_id": 4, "token_dropout": True, "position_embedding_type": "rotary"},
    "xlm": {**SMALL, "use_lang_emb": False}, "flaubert": SMALL, "luke": {"entity_vocab_size": 10},
    "data2vec-text": {}, "nomic_bert": {}, "eurobert": {**GROUPED, "mask_token_id": 4}, "xlm-roberta-xl": {},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip
# Models that mix rows or padding, or whose rotary embeddings depend on the longest row.
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
MIXING = {
    "rwkv": {},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32},
    "longrope": {
        "kind": "phi3",
        "original_max_position_embeddings": 32,
        "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32},
    },
    "dynamic": {"kind": "llama", **GROUPED, "max_position_embeddings": 32, "rope_parameters": DYNAMIC},
}
MIXING_ENCODERS = {
    "fnet": {},
    "convbert": {},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
}
QUICK = {"llama", "mamba2", "gpt_oss", "opt", "bert", "deberta-v2", "modernbert"}
TEXTS = ("hm", "a nice film It was", "a longer row of some words, and so it goes on for a while, It was")


def each(table, *, quick=QUICK):
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in sorted(table)]


def made(name, options, masked):
    options = dict(options)
    config = transformers.CONFIG_MAPPING[options.pop("kind", name)](**{**COMMON, **options})
    torch.manual_seed(0)
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.1)
    tokenizer = byte_tokenizer(ARCHITECTURES["roberta-tiny" if masked else "llama-tiny"]())
    return LanguageModel(model, tokenizer, name, masked)


def rows_of(lm, words=None):
    encode = Encoder(lm.tokenizer, masked=lm.masked, context=250, max_length=None)
    words = words or ((" great", " bad") if lm.masked else (" great deal", " bad"))
    return [encode(Example(text, words, 0, suffix="." if lm.masked else "")) for text in TEXTS]


@torch.no_grad()
def alone(lm, rows):
    """The mean log-probability of each candidate, from a fresh model that reads one sequence."""
    values = []
    for row in rows:
        for candidate in row.candidates:
            sequence = torch.tensor([row.sequences[candidate.sequence]])
            log_probs = copy.deepcopy(lm.module)(input_ids=sequence).logits[0].double().log_softmax(-1)
            terms = [log_probs[p, t] for p, t in zip(candidate.positions, candidate.tokens, strict=True)]
            values.append(sum(terms) / len(terms))
    return torch.stack(values).view(len(rows), -1)


@torch.no_grad()
def check_scores(lm):
    rows = rows_of(lm)
    expected = alone(lm, rows)
    for order in ([0, 1, 2], [2, 1, 0]):  # what came before must not matter either
        for part in (order, *([i] for i in order)):
            found = lm.score(collate([rows[i] for i in part], 1, lm.device, exact=True))
            assert torch.allclose(found, expected[part], rtol=0, atol=1e-5)
    assert lm.num_forwards == 8


@torch.no_grad()
def check_generation(lm):
    """Logits of new tokens in a batch padded on the left, against those of each prompt alone; and our own texts."""
    prompts = [tuple(lm.tokenizer(text).input_ids) for text in TEXTS]
    plain = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "use_cache": True}
    plain |= {"output_logits": True, "return_dict_in_generate": True}

    def logits(some):
        length = max(map(len, some))
        ids = torch.tensor([[1] * (length - len(p)) + list(p) for p in some])
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in some])
        return torch.stack(copy.deepcopy(lm.module).generate(input_ids=ids, attention_mask=mask, **plain).logits)

    if lm.generates_padded(max(map(len, prompts)) + 4):
        for i, found in enumerate(logits(prompts).unbind(1)):
            assert torch.allclose(found, logits([prompts[i]])[:, 0], rtol=0, atol=1e-4)
    texts = [generate(copy.deepcopy(lm), [p], 6, stops_at_newline=False)[0] for p in prompts]
    assert generate(lm, prompts, 6, stops_at_newline=False) == texts


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", each(CAUSAL))
def test_causal_models_read_and_generate_each_row_as_alone(name):
    lm = made(name, CAUSAL[name], False)
    assert lm.config.model_type == name
    assert lm.reads_padded(80)
    assert lm.generates_padded(80)
    check_scores(lm)
    check_generation(lm)


@pytest.mark.parametrize("name", each(ENCODERS))
def test_masked_models_read_each_row_as_alone(name):
    lm = made(name, ENCODERS[name], True)
    assert lm.config.model_type == name
    assert lm.reads_padded(80)
    check_scores(lm)


def test_every_model_that_is_padded_is_in_a_table():
    assert set(CAUSAL) == LEFT_PADDED
    assert set(ENCODERS) == MASKED


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", MIXING)
def test_causal_models_that_read_padding_are_read_by_length(name):
    lm = made(name, MIXING[name], False)
    assert not lm.generates_padded(80)
    check_scores(lm)
    check_generation(lm)


@pytest.mark.parametrize("name", MIXING_ENCODERS)
def test_masked_models_that_read_padding_are_read_by_length(name, capsys):
    lm = made(name, MIXING_ENCODERS[name], True)
    assert not lm.reads_padded(1)
    check_scores(lm)
    assert capsys.readouterr().err.count("rows of one length share a pass") == 1


def test_rotary_embeddings_switch_at_a_length_and_rows_below_it_share_a_pass():
    lm = made("longrope", MIXING["longrope"], False)
    assert (lm.reads_padded(32), lm.reads_padded(33)) == (True, False)


def test_probes_of_rows_by_length_run_one_after_the_other_and_cache_no_layer():
    lm = made("fnet", {}, True)
    rows = rows_of(lm)
    assert lm.copies_at_once(collate(rows, 1, lm.device)) == 1
    prepare_tuning(lm, TrainConfig(model="random:roberta-tiny", task="sst2", tuned_layers=1))
    assert SequenceCache(lm, ActivationStore(), [[s for row in rows for s in row.sequences]]).depth == 0


def test_parts_of_a_batch_hold_its_tokens_once():
    lm = made("llama", CAUSAL["llama"], False)
    batch = collate(rows_of(lm, (" great deal", " bad", " bat")), 1, lm.device, exact=True)
    seen = []
    for part, places in by_length(batch):
        assert {len(s) for s in part.sequences} == {part.input_ids.shape[1]}
        assert bool(part.attention_mask.all())
        for row, token, place in zip(part.rows, part.tokens, places, strict=True):
            there, here = batch.positions[batch.rows[place]], part.positions[row]
            sequence = batch.sequences[there // batch.input_ids.shape[1]]
            assert part.sequences[here // part.input_ids.shape[1]] == sequence
            assert here % part.input_ids.shape[1] == there % batch.input_ids.shape[1]
            assert token == batch.tokens[place]
            seen.append(int(place))
    assert sorted(seen) == list(range(len(batch.tokens)))
