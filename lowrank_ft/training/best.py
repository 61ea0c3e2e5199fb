"""The weights of the best evaluation: kept aside during the run, put back at its end."""

import math
import warnings
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from lowrank_ft.training import resume


class Best:
    """The lowest evaluation loss so far, and where it was reached; both None before the first evaluation.

    Args:
        output_dir: the folder of the run, which holds the weights meanwhile.
        keep: whether the weights are kept, and not the numbers alone.
        max_steps: of the run; after the last step the model itself has the weights.
    """

    def __init__(self, output_dir: Path, keep: bool, max_steps: int) -> None:
        self.output_dir, self.keep, self.max_steps = output_dir, keep, max_steps
        self.loss: float | None = None
        self.step: int | None = None

    def see(self, loss: float, step: int, model: nn.Module, accelerator: Accelerator, sharded: bool) -> None:
        """Note the loss of this step, and keep the weights where it is the lowest. All processes call this."""
        if math.isnan(loss) or (self.loss is not None and loss >= self.loss):
            return
        self.loss, self.step = loss, step
        if self.keep and step < self.max_steps:
            resume.write_best(self.output_dir, model, accelerator, sharded, step)

    def restore(self, loss: float | None, step: int | None) -> None:
        """Go on from what a checkpoint says. A NaN, which earlier releases took for the best, is none."""
        self.loss, self.step = (None, None) if loss is None or math.isnan(loss) else (loss, step)

    def load(self, model: Any, accelerator: Accelerator) -> None:
        """Put the weights into the model, which has no guides any more. All processes call this."""
        accelerator.wait_for_everyone()
        if self.step is None or self.step == self.max_steps:
            return
        if not resume.read_best(self.output_dir, model, self.step):
            folder = self.output_dir / resume.FOLDER
            warnings.warn(
                f"{folder}/best does not hold the weights of step {self.step}; those of the last step are kept instead",
                stacklevel=3,
            )
            self.loss = self.step = None
        elif self.step == 0 and accelerator.is_main_process:
            warnings.warn(
                f"no step of this training was better on the held-out data than the start (loss {self.loss:.4f}), so the "
                "result is the model AS IT WAS BEFORE TRAINING; lower learning_rate, give more or other data, or keep the "
                "last weights with --no-load-best-model-at-end",
                stacklevel=4,
            )
