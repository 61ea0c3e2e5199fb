"""Configs to train from scratch: values that follow from one another, and those that contradict one another."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from lowrank_ft.errors import ConfigError
from lowrank_ft.pretraining.configs import build_causal_lm, config_with

LLAMA = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=32,
)  # fmt: skip
QWEN = Qwen3Config(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=32,
)  # fmt: skip


def test_no_override_changes_nothing():
    for config in (LLAMA, QWEN):
        assert config_with(config, {}).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        (LLAMA, {"hidden_size": 32}, {"head_dim": 8, "num_key_value_heads": 4}),
        (LLAMA, {"num_attention_heads": 8}, {"head_dim": 8, "num_key_value_heads": 8}),
        (LLAMA, {"num_attention_heads": 8, "num_key_value_heads": 2}, {"num_key_value_heads": 2}),
        (LLAMA, {"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        # A width of its own stays, and a list with one value per layer is as long as there are layers.
        (QWEN, {"hidden_size": 32}, {"head_dim": 8, "num_key_value_heads": 2}),
        (QWEN, {"num_hidden_layers": 2}, {"layer_types": ["full_attention"] * 2}),
    ],
)
def test_what_follows_from_a_value_follows_from_the_new_one(config, overrides, expected):
    made = config_with(config, overrides)
    assert {name: getattr(made, name) for name in expected} == expected
    model = build_causal_lm(made, torch.float32)
    assert model.training
    assert model(torch.arange(5)[None]).logits.shape == (1, 5, 97)


def test_values_that_make_no_model():
    with pytest.raises(ConfigError, match="no model runs with this LlamaConfig: RuntimeError"):
        build_causal_lm(config_with(LLAMA, {"num_key_value_heads": 3}), torch.float32)
    with pytest.raises(ConfigError, match="num_attention_heads is 0; it must be a whole number of 1 or more"):
        config_with(LLAMA, {"num_attention_heads": 0})
    with pytest.raises(ConfigError, match="LlamaConfig refuses config_overrides {'hidden_size': 'big'}"):
        config_with(LLAMA, {"hidden_size": "big"})
