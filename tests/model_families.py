"""Tiny models with random weights of every family of transformers that zotune is tried on, by name."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
GROUPED = {"num_key_value_heads": 2}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 4}),
    "gpt_neo": ("GPTNeoConfig", {"num_hidden_layers": 2, "attention_types": [[["global", "local"], 1]]}),
    "bloom": ("BloomConfig", {"n_layer": 3, "n_head": 4}),
    "falcon": ("FalconConfig", {}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    "cohere": ("CohereConfig", GROUPED),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**GROUPED, "moe_intermediate_size": 16, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**GROUPED, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    "olmo2": ("Olmo2Config", {}),
    "opt": ("OPTConfig", {"ffn_dim": 64}),
    "opt_proj": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "stablelm": ("StableLmConfig", {"num_key_value_heads": 4}),
    "starcoder2": ("Starcoder2Config", GROUPED),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "smollm3": ("SmolLM3Config", GROUPED),
    "mamba": ("MambaConfig", {}),
    "mamba2": ("Mamba2Config", {"num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "rwkv": ("RwkvConfig", {}),
    "xglm": ("XGLMConfig", {"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 64}),
    "codegen": ("CodeGenConfig", {**GPT, "rotary_dim": 4}),
    "recurrent_gemma": ("RecurrentGemmaConfig", {"num_key_value_heads": 1, "lru_width": 32}),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT),
    "biogpt": ("BioGptConfig", {}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "lfm2": ("Lfm2Config", {**GROUPED, "layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **GROUPED,
            "head_dim": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
}
MASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {}),
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}),
    "deberta_v2": ("DebertaV2Config", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "albert": ("AlbertConfig", {"embedding_size": 16}),
    "electra": ("ElectraConfig", {"embedding_size": 16}),
    "roberta": ("RobertaConfig", {}),
    "xlm_roberta": ("XLMRobertaConfig", {}),
    "modernbert": ("ModernBertConfig", {"cls_token_id": 0, "sep_token_id": 2}),
    "mpnet": ("MPNetConfig", {}),
    "camembert": ("CamembertConfig", {}),
    "longformer": ("LongformerConfig", {"attention_window": 8}),
}
FAMILIES = {**CAUSAL, **MASKED}
TEXT = {key: value for key, value in SHAPE.items() if key != "num_hidden_layers"} | {**GROUPED, "num_hidden_layers": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 14}
QWEN_TOKENS = {"image_token_id": 318, "video_token_id": 317, "vision_start_token_id": 316, "vision_end_token_id": 315}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
# Models of text and of images or sound, whose text part is tuned: the class of the configuration, and its parts.
COMPOSITE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": {**TEXT, "head_dim": 8, "sliding_window": 8},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": {**QWEN_VISION, "embed_dim": 16, "hidden_size": 32},
            **QWEN_TOKENS,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": {**QWEN_VISION, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
            **QWEN_TOKENS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {
            "text_config": {**TEXT, **MROPE, "head_dim": 8},
            "vision_config": {**QWEN_VISION, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
            **QWEN_TOKENS,
        },
    ),
    "idefics3": (
        "Idefics3Config",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": VISION,
            "image_token_id": 319,
            "pad_token_id": 1,
        },
    ),
    "smolvlm": (
        "SmolVLMConfig",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": VISION,
            "image_token_id": 319,
            "pad_token_id": 1,
        },
    ),
    "internvl": (
        "InternVLConfig",
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
            "image_token_id": 319,
        },
    ),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": {"model_type": "pixtral", **VISION},
            "image_token_id": 319,
        },
    ),
    "paligemma": (
        "PaliGemmaConfig",
        {
            "text_config": {"model_type": "gemma", **TEXT, "head_dim": 8},
            "vision_config": {"model_type": "siglip_vision_model", **VISION, "projection_dim": 32},
            "image_token_id": 319,
            "projection_dim": 32,
        },
    ),
    "mllama": (
        "MllamaConfig",
        {
            "text_config": {
                **TEXT,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision_config": {
                **VISION,
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 16,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": 319,
        },
    ),
    "voxtral": (
        "VoxtralConfig",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "audio_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_mel_bins": 8,
                "max_source_positions": 20,
            },
            "audio_token_id": 319,
        },
    ),
}
# Mixtures of experts: the tokens of a batch are sorted by the expert that they are sent to.
EXPERTS = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"})
# Grouped products of experts, and a mask, have no double precision; some layers leave it on their way.
SINGLE = EXPERTS | {"xglm"}
PARTLY_SINGLE = frozenset({"mamba2", "rwkv", "mamba"})


def tiny_model(family: str, experts: str | None = None) -> nn.Module:
    """A tiny model of the family with random weights, in evaluation mode, in float64 where the family has it.

    `experts` is transformers' way to compute a mixture of experts: "eager", "grouped_mm", "batched_mm".
    """
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    kind = transformers.AutoModelForMaskedLM if family in MASKED else transformers.AutoModelForCausalLM
    config = getattr(transformers, name)(**{**SHAPE, **options})
    if experts is not None:
        config._experts_implementation = experts
    model: nn.Module = kind.from_config(config)
    return model.to(torch.float32 if family in SINGLE else torch.float64).eval()
