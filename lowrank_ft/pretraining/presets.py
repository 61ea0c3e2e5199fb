"""The models of Wei et al. (2024, arXiv 2406.16450 and 2407.09835) as numbers: sizes, and what training them costs.

A preset is a decoder like GPT-2 with rotary positions: LayerNorm, GELU, biases everywhere, and an output head that is
tied to the embedding. Its feed-forward linears (FFN) may have low rank, those of the first block excepted. With ``h``
the hidden size, ``a`` and ``kv`` the widths of queries and of keys, ``f`` the FFN's and ``R`` its rank:

    attention    2 h a + 2 h kv                      weights per block
    FFN          2 h f     or    2 R (h + f)
    parameters   vocab h + blocks (attention + FFN + biases + two norms) + final norm
    FLOPs        :mod:`lowrank_ft.costs.accounting`, tokens rounded down to whole steps

Pure arithmetic: no torch. :func:`lowrank_ft.pretraining.configs.preset_config` makes a transformers config of a preset.
"""

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from lowrank_ft.costs.accounting import Accounting, training_flops
from lowrank_ft.errors import ConfigError
from lowrank_ft.factorization.ranks import dense_parameters, resolve_rank, trained_parameters

_Values = dict[str, Any]
_SIZES: dict[str, _Values] = {
    "s": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, tokens=2_200_000_000),
    "m": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, tokens=6_700_000_000),
    "l": dict(hidden_size=1536, num_hidden_layers=24, num_attention_heads=12, tokens=14_580_000_000),
    "xl": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, tokens=25_500_000_000),
}
_WIDE: dict[str, _Values] = {
    "m": dict(intermediate_size=4864, rank=512, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
              tokens=10_580_000_000),
    "l": dict(intermediate_size=7424, rank=768, num_attention_heads=12, num_key_value_heads=4, head_dim=64,
              tokens=23_360_000_000),
}  # fmt: skip
# A variant is named after the share of the FFN's parameters that the paper's rank leaves; it is this share of h.
_RANK_OF_HIDDEN = {"r63": 2, "r32": 4}
PRESETS = tuple(
    f"wei2024-{size}{variant}"
    for size in _SIZES
    for variant in ("", *(f"-{v}" for v in _RANK_OF_HIDDEN), *(("-wide",) if size in _WIDE else ()))
)


@dataclass(frozen=True)
class Preset:
    """One model and its training; named as in transformers' configs where those have a name for it.

    Attributes:
        head_dim: width of one head. The attention's width, ``num_attention_heads * head_dim``, may differ from
            ``hidden_size``.
        intermediate_size: width of the FFN.
        rank: of the FFN's linears, or None where they are dense.
        dense_first_block: the FFN of the first block stays dense.
        sequence_length: tokens of context.
        sequences_per_step: sequences in one optimizer step.
    """

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rank: int | None
    tokens: int
    dense_first_block: bool = True
    vocab_size: int = 32_000
    sequence_length: int = 1024
    sequences_per_step: int = 512

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.sequence_length

    @property
    def steps(self) -> int:
        """Whole optimizer steps that the tokens are enough for."""
        return self.tokens // self.tokens_per_step

    @property
    def attention_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def dense(self) -> "Preset":
        """The same model with a dense FFN in every block."""
        return replace(self, rank=None)

    def accounting(self) -> Accounting:
        """Parameters and training FLOPs, by the formulas of this module."""
        h, f, a, kv, blocks = (
            self.hidden_size, self.intermediate_size, self.attention_width, self.key_width, self.num_hidden_layers,
        )  # fmt: skip
        embedding = self.vocab_size * h
        attention = 2 * h * a + 2 * h * kv
        biases = (a + 2 * kv + h) + (f + h)
        norm = 2 * h
        ffn = self._ffn_weights()
        return Accounting(
            parameters=embedding + blocks * (attention + biases + 2 * norm) + ffn + norm,
            ffn_parameters=ffn,
            training_flops=training_flops(
                self.steps * self.tokens_per_step,
                linears=blocks * attention + ffn + embedding,
                scores=blocks * self.sequence_length * 2 * a,
            ),
        )

    def _ffn_weights(self) -> int:
        shape = (self.intermediate_size, self.hidden_size)
        if self.rank is None:
            return 2 * self.num_hidden_layers * dense_parameters(shape)
        dense_blocks = int(self.dense_first_block)
        factored_blocks = self.num_hidden_layers - dense_blocks
        return 2 * (dense_blocks * dense_parameters(shape) + factored_blocks * trained_parameters(shape, self.rank))


def preset(name: str, **overrides: Any) -> Preset:
    """The preset ``name``, one of ``PRESETS``, with some of its values replaced.

    Values that depend on others follow them unless they are given: ``head_dim`` is ``hidden_size`` over the heads,
    there are as many key-value heads as query heads, the FFN is four times as wide as ``hidden_size``, and the rank of
    ``r63`` and ``r32`` is a half and a quarter of it. The ``wide`` presets name all of these, so there nothing follows.

    Args:
        overrides: fields of :class:`Preset`; ``rank`` may be a fraction of full rank in (0, 1], or None for dense.

    Raises:
        ConfigError: there is no such preset or value, or the values contradict one another.
        RankError: the rank exceeds the shorter side of the FFN's matrices, or is not positive.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"there is no preset {name!r}; {hint}the presets are {', '.join(PRESETS)}")
    allowed = [f.name for f in fields(Preset) if f.name != "name"]
    for key in overrides:
        if key not in allowed:
            raise ConfigError(f"a preset has no value {key!r}; it has {', '.join(allowed)}")
    size, _, variant = name.removeprefix("wei2024-").partition("-")
    values = {**_SIZES[size], **(_WIDE[size] if variant == "wide" else {}), **overrides}
    _check_whole_numbers(name, values)
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if "head_dim" not in values and hidden % heads:
        raise ConfigError(f"{name}: hidden_size {hidden} is no multiple of {heads} heads; change one, or give head_dim")
    values.setdefault("head_dim", hidden // heads)
    values.setdefault("num_key_value_heads", heads)
    values.setdefault("intermediate_size", 4 * hidden)
    values.setdefault("rank", max(1, hidden // _RANK_OF_HIDDEN[variant]) if variant in _RANK_OF_HIDDEN else None)
    if values["rank"] is not None:
        values["rank"] = resolve_rank(values["rank"], (values["intermediate_size"], hidden), f"the FFN of {name}")
    made = Preset(name, **values)
    _check(made)
    return made


def _check_whole_numbers(name: str, values: _Values) -> None:
    for key, value in values.items():
        if key == "dense_first_block":
            if not isinstance(value, bool):
                raise ConfigError(f"{name}: {key} {value!r} is neither true nor false")
        elif key != "rank" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{name}: {key} {value!r} is no whole number of 1 or more")


def _check(made: Preset) -> None:
    if made.num_attention_heads % made.num_key_value_heads:
        raise ConfigError(
            f"{made.name}: {made.num_attention_heads} query heads cannot share {made.num_key_value_heads} key-value "
            "heads evenly; num_key_value_heads must divide num_attention_heads"
        )
    if made.head_dim % 2:
        raise ConfigError(f"{made.name}: head_dim {made.head_dim} is odd; rotary positions turn pairs, so make it even")
    if made.steps == 0:
        raise ConfigError(
            f"{made.name}: {made.tokens:,} tokens are less than one step of {made.sequences_per_step} x "
            f"{made.sequence_length} = {made.tokens_per_step:,}; give more tokens, or fewer sequences_per_step"
        )
    if made.rank is not None and made.dense_first_block and made.num_hidden_layers == 1:
        raise ConfigError(
            f"{made.name}: its only block stays dense, so rank {made.rank} applies to nothing; "
            "add blocks, or set dense_first_block to false"
        )
