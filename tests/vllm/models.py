"""Small compact checkpoints, each with something in it that a linear of vLLM must cope with.

Weights are random and large enough that the tokens of an answer differ, and depend on the prompt.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Phi3Config, PreTrainedModel, Qwen2Config

import lowrank_ft
from lowrank_ft.nn import lowrank_layers
from tests.conftest import DEMO_MODEL

_SIZES = dict(
    vocab_size=97, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=256, initializer_range=0.15, bos_token_id=1, eos_token_id=2,
    pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
_RANKS = {"q_proj": 40, "k_proj": 8, "v_proj": 16, "up_proj": 48, "o_proj": 24}
_DENSE = ["layers.1.self_attn.v_proj", "layers.0.mlp.up_proj", "layers.1.mlp.down_proj"]

MODELS: dict[str, tuple[str, str]] = {
    "trained": ("a trained Llama, 3 key-value heads of 6", "pivoted"),
    "trained-factors": ("the same", "factors"),
    "mixed": ("Qwen2, biases of q, k, v; other ranks and dense parts in one packed linear", "pivoted"),
    "mixed-factors": ("the same", "factors"),
    "one-kv-head": ("Qwen2 with 1 key-value head, which two processes both hold", "pivoted"),
    "bias": ("Llama, biases everywhere", "pivoted"),
    "bias-factors": ("the same", "factors"),
    "packed": ("Phi3, whose checkpoint packs q, k, v itself: one pair of factors", "pivoted"),
    "packed-factors": ("the same", "factors"),
}
"""Name to what is special, and the stored form."""
SPLIT = ["mixed", "one-kv-head", "bias", "bias-factors", "packed"]
"""Those that are also served by two processes; the trained one has 3 heads, which two do not divide."""


_RANDOM_PROMPTS = [[1, 5, 9, 33, 40], list(range(3, 60))]
_TRAINED_PROMPTS = [
    "import os\n\n\ndef main(path):\n    with open(path) as file:\n",
    "class Node:\n    def __init__(self, ",
]


def prompts(name: str) -> list[list[int]]:
    """Token ids to ask ``name`` with."""
    if not name.startswith("trained"):
        return _RANDOM_PROMPTS
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    return [tokenizer(text)["input_ids"] for text in _TRAINED_PROMPTS]


def write(name: str, folder: Path) -> None:
    """The compact checkpoint ``name`` of ``MODELS`` into ``folder``."""
    form = MODELS[name][1]
    torch.manual_seed(0)
    if name.startswith("trained"):
        model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
        lowrank_ft.convert(model, param_ratio=0.9)
    else:
        model = _random(name.removesuffix("-factors"))
        packed = name.startswith("packed")
        lowrank_ft.convert(
            model, rank=32, rank_pattern={} if packed else _RANKS, exclude_modules=None if packed else _DENSE
        )
        for _, layer in lowrank_layers(model):
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1)
    trained = DEMO_MODEL if name.startswith("trained") else None
    lowrank_ft.save_compact(model, folder, form=form, companions_from=trained)


def _random(name: str) -> PreTrainedModel:
    configs: dict[str, Any] = {
        "mixed": lambda: Qwen2Config(**_SIZES),
        "one-kv-head": lambda: Qwen2Config(**{**_SIZES, "num_key_value_heads": 1}),
        "bias": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
        "packed": lambda: Phi3Config(**{k: v for k, v in _SIZES.items() if k != "head_dim"}),
    }
    return AutoModelForCausalLM.from_config(configs[name](), dtype=torch.float32).eval()
