"""Decoders whose blocks are attention and a feed-forward network."""

from tests.architectures.row import GROUPED, WITH_IDS, Row

_HEAD = {**GROUPED, "head_dim": 8}
_GPT = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)

ROWS = [
    Row("LlamaForCausalLM", "LlamaConfig", GROUPED),
    Row("MistralForCausalLM", "MistralConfig", GROUPED),
    Row("Ministral3ForCausalLM", "Ministral3Config", _HEAD),
    Row("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    Row("Qwen3ForCausalLM", "Qwen3Config", _HEAD),
    Row("GemmaForCausalLM", "GemmaConfig", _HEAD),
    Row("Gemma2ForCausalLM", "Gemma2Config", _HEAD),
    Row("Gemma3ForCausalLM", "Gemma3TextConfig", _HEAD),
    Row("Gemma3nForCausalLM", "Gemma3nTextConfig", {
        **_HEAD, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0,
        "laurel_rank": 16, "intermediate_size": [48, 48], "activation_sparsity_pattern": [0.0, 0.0],
    }),
    Row("Gemma4ForCausalLM", "Gemma4TextConfig", {
        **_HEAD, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16,
    }),
    Row("PhiForCausalLM", "PhiConfig", GROUPED),
    Row("Phi3ForCausalLM", "Phi3Config", GROUPED),
    Row("GPT2LMHeadModel", "GPT2Config", _GPT),
    Row("GPTNeoForCausalLM", "GPTNeoConfig", {
        "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "window_size": 8,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    Row("GPTNeoXForCausalLM", "GPTNeoXConfig", WITH_IDS),
    Row("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    Row("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT),
    Row("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
    Row("FalconForCausalLM", "FalconConfig", {**WITH_IDS, "ffn_hidden_size": 48}),
    Row("OPTForCausalLM", "OPTConfig", {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0,
    }),
    Row("BloomForCausalLM", "BloomConfig", {
        "vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2,
    }),
    Row("MptForCausalLM", "MptConfig", {
        "vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64,
    }),
    Row("OlmoForCausalLM", "OlmoConfig", GROUPED),
    Row("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    Row("Olmo3ForCausalLM", "Olmo3Config", GROUPED),
    Row("CohereForCausalLM", "CohereConfig", GROUPED),
    Row("Cohere2ForCausalLM", "Cohere2Config", GROUPED),
    Row("GraniteForCausalLM", "GraniteConfig", GROUPED),
    Row("StableLmForCausalLM", "StableLmConfig", GROUPED),
    Row("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
    Row("Glm4ForCausalLM", "Glm4Config", _HEAD),
]  # fmt: skip
