"""Decoders with experts, with latent attention, with state-space layers, and with several of these."""

from tests.architectures.row import GROUPED, WITH_IDS, Row

_HEAD = {**GROUPED, "head_dim": 8}
_DEEPSEEK = {
    **WITH_IDS, "num_key_value_heads": 4, "moe_intermediate_size": 32, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_expand": 2, "mamba_chunk_size": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

ROWS = [
    Row("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Row("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 32}),
    Row("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_HEAD, **_EXPERTS}),
    Row("OlmoeForCausalLM", "OlmoeConfig", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    Row("GraniteMoeForCausalLM", "GraniteMoeConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Row("GptOssForCausalLM", "GptOssConfig", {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Row("Llama4ForCausalLM", "Llama4TextConfig", {**_HEAD, "intermediate_size_mlp": 48, "num_local_experts": 4}),
    Row("PhimoeForCausalLM", "PhimoeConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Row("DbrxForCausalLM", "DbrxConfig", {
        "vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "pad_token_id": 0,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    }, full={"attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 5e5}}),
    Row("Glm4MoeForCausalLM", "Glm4MoeConfig", {
        **_HEAD, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    }),
    Row("DeepseekV2ForCausalLM", "DeepseekV2Config", _DEEPSEEK),
    Row("DeepseekV3ForCausalLM", "DeepseekV3Config", _DEEPSEEK),
    Row("DeepseekV4ForCausalLM", "DeepseekV4Config", {
        **WITH_IDS, "moe_intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16,
        "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "o_groups": 2, "o_lora_rank": 16,
        "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "hc_mult": 2, "num_nextn_predict_layers": 0,
        "num_hidden_layers": 3, "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 6},
    }),
    Row("MambaForCausalLM", "MambaConfig", {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 16,
    }),
    Row("Mamba2ForCausalLM", "Mamba2Config", {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8,
        "n_groups": 1, "chunk_size": 8,
    }),
    Row("FalconH1ForCausalLM", "FalconH1Config", {**GROUPED, **_STATES, "mamba_d_ssm": 64}),
    Row("BambaForCausalLM", "BambaConfig", {**GROUPED, **_STATES, "attn_layer_indices": [1]}),
    Row("JambaForCausalLM", "JambaConfig", {
        **GROUPED, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "mamba_d_state": 8, "mamba_dt_rank": 16, "use_mamba_kernels": False,
    }),
    Row("Zamba2ForCausalLM", "Zamba2Config", {
        **WITH_IDS, "num_hidden_layers": 3, "layers_block_type": ["hybrid", "mamba", "hybrid"], "mamba_d_state": 8,
        "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8, "use_mamba_kernels": False, "adapter_rank": 16,
    }),
    Row("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", {
        **GROUPED, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16,
    }),
    Row("NemotronHForCausalLM", "NemotronHConfig", {
        **_HEAD, "layers_block_type": ["mamba", "attention", "moe"], "ssm_state_size": 8, "mamba_num_heads": 8,
        "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8, "use_mamba_kernels": False, "n_routed_experts": 4,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    }),
    Row("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", {
        **GROUPED, **_STATES, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    }),
    Row("Qwen3NextForCausalLM", "Qwen3NextConfig", {
        **_HEAD, **_EXPERTS, "shared_expert_intermediate_size": 32, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
    }),
    Row("Lfm2ForCausalLM", "Lfm2Config", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
]  # fmt: skip
