"""Stock transformers configs to train from scratch: those of the presets, and others with values that differ.

For the presets, StarCoder2 is the architecture in transformers that has all of it: rotary positions, LayerNorm with bias, a plain
two-linear FFN, biases on every linear, a tied output head, grouped key-value heads, and an attention width of its own
(``head_dim``, which its code reads although its config does not declare it). The presets' arithmetic and the model's
real parameter count are equal.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Starcoder2Config

from lowrank_ft.errors import ConfigError
from lowrank_ft.pretraining.presets import Preset, preset


def preset_config(name: str | Preset, **overrides: Any) -> Starcoder2Config:
    """A config that ``AutoModelForCausalLM.from_config`` builds the dense model of a preset from.

    The rank is no part of it: give it to :func:`lowrank_ft.initialize_lowrank` afterwards. No token has a special
    meaning; set ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` to those of the tokenizer.

    Args:
        name: one of ``lowrank_ft.pretraining.presets.PRESETS``, or a preset that is made already.
        overrides: see :func:`lowrank_ft.pretraining.presets.preset`; ``vocab_size`` is that of the tokenizer as a rule.

    Raises:
        ConfigError, RankError: see :func:`lowrank_ft.pretraining.presets.preset`.
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


def config_with(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """``config`` with some of its values replaced, and made anew: what follows from a value follows from the new one.

    Raises:
        ConfigError: it has no such value, or refuses it.
    """
    kind = type(config).__name__
    allowed = {*config.to_dict(), *config.attribute_map} - {"model_type", "architectures"}
    for name, value in overrides.items():
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(f"config_overrides: {kind} has no value {name!r} that could be set{hint}")
        if name in ("num_hidden_layers", "num_attention_heads") and not (isinstance(value, int) and value >= 1):
            raise ConfigError(f"config_overrides: {name} is {value!r}; it must be a whole number of 1 or more")
    try:
        made = type(config)(**{**_independent(config, overrides), **overrides})
        made._name_or_path = config._name_or_path  # where code of its own would be read from
        return made
    except Exception as error:  # each class checks in its own way
        raise ConfigError(f"{kind} refuses config_overrides {dict(overrides)}: {_in_one_line(error)}") from error


def _independent(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``config`` but for those that say the same as one that will be replaced."""
    own = config.to_diff_dict()
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    hidden = getattr(config, "hidden_size", None)
    if "num_hidden_layers" in overrides:
        own = {name: v for name, v in own.items() if not (isinstance(v, list) and len(v) == layers)}
    if "num_attention_heads" in overrides and getattr(config, "num_key_value_heads", None) == heads:
        own.pop("num_key_value_heads", None)
    same_head = hidden is not None and heads and getattr(config, "head_dim", None) == hidden // heads
    if {"hidden_size", "num_attention_heads"} & overrides.keys() and same_head:
        own.pop("head_dim", None)
    return own


def build_causal_lm(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model with fresh weights that is known to run: two tokens have passed through it.

    Raises:
        ConfigError: the values of the config contradict one another, or its code may not be run.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
        with torch.no_grad():
            model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a value that does not fit is found wherever it is used first
        raise ConfigError(f"no model runs with this {type(config).__name__}: {_in_one_line(error)}") from error
    return model.train()


def _in_one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"
