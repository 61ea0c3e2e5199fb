"""What a model is shown during its conversion, and how hard its factors are fitted to it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lowrank_ft.conversion.activations import Activations
from lowrank_ft.conversion.chains import Batch
from lowrank_ft.conversion.effort import EFFORTS
from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.errors import ConfigError, DataError


@dataclass(frozen=True)
class Calibration:
    """Calibration data and settings; the defaults are those of ``--effort default``.

    Attributes:
        batches: arguments of the model's forward: ``input_ids (batch, length)`` and, with padding, ``attention_mask``,
            or ``pixel_values``, ... Distillation takes one batch per step.
        held_out: batches like these that nothing is fitted to. Refinement and distillation are judged by them: what
            does not help there is undone. Without them, what helps on ``batches`` is kept.
        source: what the data are, for the record.
        method: how factors are found, unless :func:`convert` is told.
        fit_tokens: how many tokens regression and block refinement see: the first of the batches.
        damping: share of the mean input power that is added to every direction of the moments.
        refine_epochs: passes of block refinement over the data; 0 for none.
        distill_epochs: passes of end-to-end distillation; 0 for none.
        refine_learning_rate, distill_learning_rate: of AdamW on the factors, at their peak; None for distillation: it
            is measured.
        train_vectors: whether the scales of norms, and biases, are trained beside the factors.
        activations_dir: a folder to keep hidden states in where they do not fit into memory.
        seed: order of the batches.
        processes: who shares the work. ``batches`` and ``held_out`` are those of all; the properties below them are
            this process's rows.
        importance: by dense model and name of a linear, what was measured of it with these batches, so that it is
            measured once: see :func:`lowrank_ft.conversion.sensitivity.output_importance`.
    """

    batches: Sequence[Batch]
    source: str = "given batches"
    held_out: Sequence[Batch] = ()
    method: str = EFFORTS["default"].method
    fit_tokens: int = EFFORTS["default"].fit_tokens
    damping: float = 0.01
    refine_epochs: int = EFFORTS["default"].refine_epochs
    distill_epochs: float = EFFORTS["default"].distill_epochs
    refine_learning_rate: float = 1e-3
    distill_learning_rate: float | None = None
    train_vectors: bool = True
    activations_dir: Path | None = None
    seed: int = 0
    processes: Processes = ONE
    importance: WeakKeyDictionary[nn.Module, dict[str, Tensor | None]] = field(
        default_factory=WeakKeyDictionary, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for batch in (*self.batches, *self.held_out):
            self.processes.rows(batch)  # each has some
        if not self.batches:
            raise DataError("the calibration data hold no batch; give at least one")
        for name in ("damping", "refine_epochs", "distill_epochs", "refine_learning_rate", "distill_learning_rate"):
            if not 0 <= (0.0 if getattr(self, name) is None else getattr(self, name)) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")

    def first(self, tokens: int) -> list[Batch]:
        """The first batches, with about so many tokens."""
        return [self.processes.rows(b) for b in first_batches(self.batches, tokens)]

    @property
    def fitted(self) -> list[Batch]:
        """What regression and block refinement see."""
        return self.first(self.fit_tokens)

    @property
    def distilled(self) -> list[Batch]:
        """What distillation sees."""
        return [self.processes.rows(b) for b in self.batches]

    @property
    def judging(self) -> list[Batch]:
        """What is held out."""
        return [self.processes.rows(b) for b in self.held_out]

    @property
    def fitted_and_held_out(self) -> list[Batch]:
        return [*self.fitted, *self.judging]

    @property
    def tokens(self) -> int:
        """Tokens of all batches, padding not counted; an image counts as its patches of 16 x 16 pixels."""
        return sum(map(positions, self.batches))

    def store(self) -> Activations:
        """An empty place for hidden states."""
        return Activations(folder=self.activations_dir)


def default_method(calibration: Calibration | None) -> str:
    """What the calibration says, and ``svd`` without one."""
    return "svd" if calibration is None else calibration.method


def first_batches(batches: Sequence[Batch], tokens: int) -> Sequence[Batch]:
    """As many as hold at most ``tokens`` positions, padding included, and at least one batch."""
    taken, found = 0, 0
    for batch in batches:
        found += _positions(batch)
        if taken and found > tokens:
            break
        taken += 1
    return batches[:taken]


def few_rows(batch: Batch, most: int) -> list[Batch]:
    """A batch in parts of at most ``most`` positions each, padding included, and at least one row.

    It stays whole where its arguments have different numbers of rows, as images of a text have: what belongs together is
    not known here.
    """
    rows = len(next(iter(batch.values())))
    if any(len(v) != rows for v in batch.values()):
        return [batch]
    length = max((v.shape[1] for v in batch.values() if v.dim() == 2), default=1)
    size = max(1, most // length)
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, rows, size)]


def positions(batch: Batch) -> int:
    """Tokens of a batch, padding not counted; an image counts as its patches of 16 x 16 pixels."""
    mask = batch.get("attention_mask")
    return int((mask != 0).sum()) if mask is not None else _positions(batch)


def _positions(batch: Batch) -> int:
    """How many hidden states a batch makes, roughly where they are patches or frames."""
    first = next(iter(batch.values()))
    if first.dim() == 4:
        return max(len(first), first[:, 0].numel() // 256)
    return len(first) * max(first.shape[1:], default=1)
