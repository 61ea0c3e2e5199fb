"""Stock transformers configs of the presets.

StarCoder2 is the architecture in transformers that has all of it: rotary positions, LayerNorm with bias, a plain
two-linear FFN, biases on every linear, a tied output head, grouped key-value heads, and an attention width of its own
(``head_dim``, which its code reads although its config does not declare it). The presets' arithmetic and the model's
real parameter count are equal.
"""

from typing import Any

from transformers import Starcoder2Config

from lowrank_ft.presets import Preset, preset


def preset_config(name: str | Preset, **overrides: Any) -> Starcoder2Config:
    """A config that ``AutoModelForCausalLM.from_config`` builds the dense model of a preset from.

    The rank is no part of it: give it to :func:`lowrank_ft.initialize_lowrank` afterwards. No token has a special
    meaning; set ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` to those of the tokenizer.

    Args:
        name: one of ``lowrank_ft.presets.PRESETS``, or a preset that is made already.
        overrides: see :func:`lowrank_ft.presets.preset`; ``vocab_size`` is that of the tokenizer as a rule.

    Raises:
        ConfigError, RankError: see :func:`lowrank_ft.presets.preset`.
    """
    made = preset(name, **overrides) if isinstance(name, str) else name
    undeclared: dict[str, Any] = {"head_dim": made.head_dim}
    return Starcoder2Config(
        vocab_size=made.vocab_size,
        hidden_size=made.hidden_size,
        intermediate_size=made.intermediate_size,
        num_hidden_layers=made.num_hidden_layers,
        num_attention_heads=made.num_attention_heads,
        num_key_value_heads=made.num_key_value_heads,
        max_position_embeddings=made.sequence_length,
        hidden_act="gelu",
        initializer_range=0.02,
        use_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["Starcoder2ForCausalLM"],
        **undeclared,
    )
