"""Convert, save and load across architectures whose linears are nn.Linear or Conv1D."""

import pytest
import torch
import transformers as tf

import lowrank_ft
from lowrank_ft.export import save_compact
from lowrank_ft.factorization.plan import make_plan
from lowrank_ft.nn import lowrank_layers
from lowrank_ft.nn.forms import stored_as

TOKENS = {"input_ids": torch.arange(3, 15)[None]}
SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = tf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
WHISPER = tf.WhisperConfig(
    vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16, max_target_positions=32,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
    begin_suppress_tokens=None,
)  # fmt: skip
VIT = tf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32)
GPT2 = tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
IMAGE = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)}

CASES = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**GROUPED), TOKENS),
    "llama, tied": (tf.LlamaForCausalLM, tf.LlamaConfig(**GROUPED, tie_word_embeddings=True), TOKENS),
    "llama, classifier": (tf.LlamaForSequenceClassification, tf.LlamaConfig(**GROUPED, num_labels=3), TOKENS),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**GROUPED), TOKENS),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**GROUPED), TOKENS),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**GROUPED, head_dim=8), TOKENS),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**GROUPED, head_dim=8), TOKENS),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config(**GROUPED), TOKENS),
    "gpt2": (tf.GPT2LMHeadModel, GPT2, TOKENS),
    "opt": (
        tf.OPTForCausalLM,
        tf.OPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                     max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0),
        TOKENS,
    ),
    "mixtral": (
        tf.MixtralForCausalLM, tf.MixtralConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1), TOKENS
    ),
    "bert": (tf.BertModel, tf.BertConfig(**SMALL), TOKENS),
    "bert, masked": (tf.BertForMaskedLM, tf.BertConfig(**SMALL), TOKENS),
    "roberta, classifier": (tf.RobertaForSequenceClassification, tf.RobertaConfig(**SMALL), TOKENS),
    "t5": (tf.T5ForConditionalGeneration, T5, {**TOKENS, "decoder_input_ids": torch.arange(5)[None]}),
    "vit": (tf.ViTForImageClassification, VIT, IMAGE),
    "whisper": (
        tf.WhisperForConditionalGeneration, WHISPER,
        {"input_features": torch.linspace(-1, 1, 8 * 32).view(1, 8, 32), "decoder_input_ids": torch.arange(5)[None]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_loads_as_it_was_in_memory(case, tmp_path):
    cls, config, inputs = CASES[case]
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.device("meta"):
        assert make_plan(cls(config), param_ratio=0.6) == make_plan(model, param_ratio=0.6)
    plan = lowrank_ft.convert(model, param_ratio=0.6)
    assert len(plan.ranks) >= 4
    save_compact(model, tmp_path / "compact")
    loaded, info = cls.from_pretrained(tmp_path / "compact", output_loading_info=True)
    assert not any(info.values()), info
    assert {n: layer.rank for n, layer in lowrank_layers(loaded)} == plan.ranks
    with torch.no_grad(), stored_as(model, "pivoted"):
        expected, written, read = model(**inputs)[0], model.state_dict(), loaded.state_dict()
    assert written.keys() == read.keys()
    assert all(torch.equal(read[k], v) for k, v in written.items())
    with torch.no_grad():
        # Not to the bit: kernels may round differently where a file's mapping aligns a weight differently.
        torch.testing.assert_close(loaded(**inputs)[0], expected, atol=1e-6, rtol=1e-5)
        lowrank_ft.merge(loaded)
        torch.testing.assert_close(loaded(**inputs)[0], expected, atol=2e-4, rtol=1e-3)
    loaded.save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(cls.from_pretrained(tmp_path / "dense")(**inputs)[0], expected, atol=2e-4, rtol=1e-3)
