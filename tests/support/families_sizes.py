"""The keys that make a config tiny, whatever the family, and what single families need besides. See ``families.py``."""

from __future__ import annotations

from typing import Any

CONTEXT, TRAINED, WINDOW = 128, 32, 16  # positions: all, those before rotary scaling sets in, those that a window shows
VOCABULARY = 96
PROMPT_IDS = range(8, 88)  # below are pad, bos and eos; above what stands for images and sounds

NUMBERS: list[tuple[int, str]] = [
    (
        64,
        "hidden_size n_embd d_model dim emb_dim embedding_size word_embed_proj_dim embedding_dim "
        "input_embedding_size output_embedding_size backbone_hidden_size lru_width attention_hidden_size "
        "dim_model_base mamba_d_ssm",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
        "linear_num_heads index_n_heads num_experts n_routed_experts num_local_experts moe_num_experts "
        "linear_num_value_heads n_mamba_heads time_step_rank mamba_dt_rank num_query_groups num_centroids "
        "hc_lowrank laurel_rank gated_norm_rank d_rel zero_expert_num linear_num_key_heads heads_per_ngram",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
        "moe_topk moe_k top_k_experts encoder_layers num_encoder_layers hc_mult hc_count n_shared_experts "
        "centroid_intermediate_top_k altup_num_inputs o_groups",
    ),
    (
        16,
        "head_dim d_kv d_head dim_head kv_channels attention_head_size swa_head_dim v_head_dim "
        "qk_rope_head_dim qk_nope_head_dim global_head_dim linear_head_dim linear_key_head_dim "
        "linear_value_head_dim index_head_dim mamba_head_dim mamba_d_head state_size mamba_d_state "
        "ssm_state_size q_lora_rank kv_lora_rank o_lora_rank mamba_headdim adapter_rank router_hidden_size "
        "hidden_size_per_layer_input ple_embed_dim attention_head_dim prompt_mid_dim pronunciation_embed_dim "
        "shape_embed_dim",
    ),
    (
        96,
        "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dim_ff dff d_inner "
        "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size intermediate_size_mlp "
        "expert_ffn_hidden_size dense_intermediate_size shared_experts_intermediate_size feed_forward_size "
        "moe_shared_expert_intermediate_size",
    ),
    (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size pronunciation_vocab_size "
        "shape_vocab_size ngram_vocab_size_base encoder_hash_byte_group_vocab",
    ),
    (
        CONTEXT,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length "
        "max_source_positions max_target_positions position_bias_max_distance rel_extent",
    ),
    (
        WINDOW,
        "sliding_window sliding_window_size window_size local_attention attention_window_size "
        "attention_chunk_size local_attention_window_len keep_window_size floor_scale",
    ),
    (
        TRAINED,
        "original_max_position_embeddings",
    ),
    (
        8,
        "index_topk mamba_chunk_size chunk_size block_size index_block_size rotary_dim split_ngram_parts",
    ),
    (
        1,
        "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers n_groups mamba_n_groups "
        "mamba_ngroups num_nextn_predict_layers num_mem_blocks",
    ),
]
SIZES = {key: number for number, keys in NUMBERS for key in keys.split()}
WINDOWS = frozenset(
    {
        "sliding_window",
        "sliding_window_size",
        "window_size",
        "local_attention",
        "attention_window_size",
        "attention_chunk_size",
    }
)
LAYERS = frozenset(
    {
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "decoder_layers",
        "num_decoder_layers",
        "num_blocks",
    }
)
KINDS = frozenset(
    {
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "block_types",
        "indexer_types",
        "no_rope_layers",
    }
)
SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "forced_eos": 2, "sep": 3, "cls": 4, "mask": 5, "eod": 3}

# What no rule above finds; a nested config is given as a dict, and merged.
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
_QWEN4 = {**_INDEXER, "indexer_compress_ratio": 2, "ple_layer_ids": [1], "ple_embed_dim": 64, "eos_token_id": 2}
_SHARED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        **_TWO_KINDS,
        "rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gemma3n_text": {**_SHARED, "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
    "gemma2": {"attn_logit_softcapping": 5.0},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
        "hash_seed": 0,  # its hashes are random otherwise
    },
    "vaultgemma": {"attn_logit_softcapping": 5.0},
    "xlstm": {"chunk_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4, "n_mamba_heads": 8},
}
