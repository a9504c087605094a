"""Further families of transformers, whose tiny configuration follows from the names of its keys alone."""

from __future__ import annotations

from typing import Any

from model_families import SHAPE

_LAYERS = {"n_layer": 3, "n_layers": 3, "num_layers": 3, "decoder_layers": 3, "encoder_layers": 3}
_WIDTHS = {"d_model": 32, "n_embd": 32, "dim": 32, "lru_width": 32, "embedding_size": 16}
_HEADS = {"n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4}
_INNER = {"ffn_dim": 64, "hidden_dim": 64, "d_ff": 64, "inner_size": 64, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64}
_HEAD_SIZES = {"head_dim": 8, "global_head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_RANKS = {"q_lora_rank": 16, "kv_lora_rank": 16, "rotary_dim": 4, "index_n_heads": 2, "index_head_dim": 8}
_EXPERTS = {
    **{"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_k": 2, "moe_topk": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "intermediate_size_mlp": 64},
    **{"moe_shared_expert_intermediate_size": 16, "prefix_layer_count": 1},
}
_STATES = {
    **{"state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
_OTHER = {"num_key_value_heads": 2, "sliding_window": 8, "n_positions": 256, "max_seq_len": 256}
_PER_LAYER = {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8}
SMALL = {
    **SHAPE,
    **{
        **_LAYERS,
        **_WIDTHS,
        **_HEADS,
        **_INNER,
        **_HEAD_SIZES,
        **_RANKS,
        **_EXPERTS,
        **_STATES,
        **_OTHER,
        **_PER_LAYER,
    },
}
CAUSAL_TYPES = """
afmoe apertus apertus1p5_text arcee aria_text beam bert-generation big_bird bitnet cohere2 cohere2_moe ctrl cwm
data2vec-text deepseek_v4 diffllama doge dots1 ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe
falcon_mamba flex_olmo flint gemma3_text gemma4_text gemma4_unified_text glm glm4 glm4_moe gpt-sw3
gpt_neox_japanese granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense
hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling_text internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lara_mini
lfm3 llama4_text megatron-bert mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text ministral ministral3
modernbert-decoder nanochat nemotron nemotron_h olmo olmo3 olmo_hybrid olmoe openai-gpt persimmon phimoe rembert
roberta-prelayernorm roformer sarvam_moe seed_oss solar_open trocr vaultgemma xlm xlm-roberta-xl
""".split()  # noqa: SIM905 - a list of 90 names reads better so
MASKED_TYPES = """
big_bird convbert data2vec-text deberta ernie eurobert flaubert fnet gte ibert jina_embeddings_v3 layoutlm
megatron-bert mobilebert mra nomic_bert nystromformer rembert roberta-prelayernorm roformer tapas ultrabert xlm
xlm-roberta-xl yoso
""".split()  # noqa: SIM905 - a list of 90 names reads better so


def small_options(config_class: Any) -> dict[str, Any]:
    """The small sizes that a class of configurations has keys for."""
    keys = config_class().to_dict()
    return {key: value for key, value in SMALL.items() if key in keys or key in SHAPE}


def further(types: list[str], *, is_decoder: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """The families of these types that the installed transformers has, as `model_families` names them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    found = {}
    for name in types:
        if name not in CONFIG_MAPPING:
            continue
        config_class = CONFIG_MAPPING[name]
        both = {"is_decoder": True} if is_decoder and name in MASKED else {}
        found[f"{name} (decoder)" if both else name] = (config_class.__name__, {**small_options(config_class), **both})
    return found
