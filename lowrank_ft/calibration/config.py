"""What a model is shown during its conversion, and how hard its factors are fitted to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_ft.calibration.activations import Activations
from lowrank_ft.calibration.chains import Batch
from lowrank_ft.errors import ConfigError, DataError

BLOCKWISE_TOKENS = 65_536
"""Tokens that block-by-block work sees at most: its hidden states are held, and a block learns little from more."""


@dataclass(frozen=True)
class Calibration:
    """Calibration data and settings.

    Attributes:
        batches: arguments of the model's forward: ``input_ids (batch, length)`` and, with padding, ``attention_mask``,
            or ``pixel_values``, ... Distillation takes one batch per step.
        source: what the data are, for the record.
        damping: share of the mean input power that is added to every direction of the moments.
        refine_epochs: passes of block refinement over the data; 0 for none.
        distill_epochs: passes of end-to-end distillation; 0 for none.
        refine_learning_rate, distill_learning_rate: of AdamW on the factors, at their peak.
        activations_dir: a folder to keep hidden states in where they do not fit into memory.
        seed: order of the batches.
    """

    batches: Sequence[Batch]
    source: str = "given batches"
    damping: float = 0.01
    refine_epochs: int = 3
    distill_epochs: float = 1.0
    refine_learning_rate: float = 1e-3
    distill_learning_rate: float = 1e-3
    activations_dir: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.batches:
            raise DataError("the calibration data hold no batch; give at least one")
        for name in ("damping", "refine_epochs", "distill_epochs", "refine_learning_rate", "distill_learning_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")

    @property
    def tokens(self) -> int:
        """Positions of all batches, padding not counted."""
        return sum(map(_size, self.batches))

    @property
    def block_batches(self) -> Sequence[Batch]:
        """The first batches, up to ``BLOCKWISE_TOKENS`` tokens and at least one batch."""
        return first_batches(self.batches, BLOCKWISE_TOKENS)

    def store(self) -> Activations:
        """An empty place for hidden states."""
        return Activations(folder=self.activations_dir)


def first_batches(batches: Sequence[Batch], tokens: int) -> Sequence[Batch]:
    """As many as hold at most ``tokens`` positions, padding included, and at least one batch."""
    taken, found = 0, 0
    for batch in batches:
        found += _positions(batch)
        if taken and found > tokens:
            break
        taken += 1
    return batches[:taken]


def _positions(batch: Batch) -> int:
    """How many hidden states a batch makes, roughly: an image is cut into patches of 16 x 16 pixels."""
    first = next(iter(batch.values()))
    if first.dim() == 4:
        return max(len(first), first[:, 0].numel() // 256)
    return len(first) * max(first.shape[1:], default=1)


def _size(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    if mask is not None:
        return int((mask != 0).sum())
    first = next(iter(batch.values()))
    # Pixels are no tokens: an image counts once.
    return first.numel() if first.dim() == 2 else len(first)
