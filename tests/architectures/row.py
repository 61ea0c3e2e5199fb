"""One row of the architecture matrix: a class of transformers, a tiny config, and inputs for one forward pass."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
WITH_IDS = {**SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**WITH_IDS, "num_key_value_heads": 2}
T5 = dict(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
WHISPER = dict(
    vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16, max_target_positions=32,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
    begin_suppress_tokens=None,
)  # fmt: skip
TEXT = {k: v for k, v in GROUPED.items() if not k.endswith("_token_id")}
SEES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
)

Inputs = Callable[[], dict[str, torch.Tensor]]


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 15)[None]}


def both_sides() -> dict[str, torch.Tensor]:
    """Of a model with an encoder and a decoder."""
    return {**tokens(), "decoder_input_ids": torch.arange(3, 8)[None]}


def image(size: int = 16) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))}


def image_and_tokens() -> dict[str, torch.Tensor]:
    return {**tokens(), **image()}


def waveform() -> dict[str, torch.Tensor]:
    return {"input_values": torch.linspace(-1, 1, 800).sin()[None]}


@dataclass(frozen=True)
class Row:
    """A class, what its config changes of the defaults, and what it is given.

    Attributes:
        cls: name of the class in transformers.
        config: name of its config's class.
        sizes: what makes it tiny.
        inputs: tensors of one forward pass.
        unreached: beginnings of the names of linears that these inputs do not come to, such as those of a vision tower.
        full: what the default config lacks to make a model of full size.
    """

    cls: str
    config: str
    sizes: dict[str, Any] = field(default_factory=dict)
    inputs: Inputs = tokens
    full: dict[str, Any] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()

    @property
    def missing(self) -> str | None:
        """The class that the installed transformers does not have."""
        return next((name for name in (self.cls, self.config) if not hasattr(transformers, name)), None)

    def build(self, on: str = "cpu") -> transformers.PreTrainedModel:
        """With random weights, the same ones each time, in evaluation mode; or on the meta device."""
        torch.manual_seed(0)
        with torch.device(on):
            model = getattr(transformers, self.cls)(getattr(transformers, self.config)(**self.sizes))
        for parameter in () if on == "meta" else model.parameters():
            if not parameter.any():  # biases would not be tested, and what lies behind a gate would get no gradient
                torch.nn.init.normal_(parameter, std=0.02)
        return model.eval()

    def full_size(self) -> transformers.PreTrainedModel:
        """As the class's default config describes it, on the meta device."""
        with torch.device("meta"):
            return getattr(transformers, self.cls)(getattr(transformers, self.config)(**self.full))
