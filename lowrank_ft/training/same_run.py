"""What a resumed run must share with the run that it resumes, to be the same run."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_ft.data.examples import TokenizedData
from lowrank_ft.errors import TrainingStateError
from lowrank_ft.training.options import TrainArguments

_OPTIONS = (
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm",
    "alpha_schedule", "seed", "distill_weight", "distill_temperature", "guide_mode", "fixed_flops", "optim", "trainable",
    "lora_r", "lora_alpha", "decay_vectors",
)  # fmt: skip


def options_to_match(args: TrainArguments) -> dict[str, Any]:
    """Those that change what is computed."""
    return {name: getattr(args, name) for name in _OPTIONS}


def data_to_match(
    train_data: TokenizedData, eval_data: TokenizedData | None, distill_data: TokenizedData | None
) -> dict[str, Any]:
    return {
        "train_examples": len(train_data),
        "train_data": train_data.fingerprint(),
        "eval_data": None if eval_data is None else eval_data.fingerprint(),
        "distill_data": None if distill_data is None else distill_data.fingerprint(),
    }


def check_same_run(checkpoint: Path, then: Mapping[str, Any], now: Mapping[str, Any], may_change: bool) -> None:
    """Compare what a checkpoint says of its run with this run.

    Args:
        may_change: warn of differences instead.

    Raises:
        TrainingStateError: they differ.
    """
    # A setting that only this run has is a difference, too: a rank may be given to a layer that had none before.
    # A new value in the model's config is not: a newer transformers may have added it.
    names = [*then, *(name for name in now if name not in then and not name.startswith("config."))]
    changed = [f"{k} {then.get(k)!r} -> {now.get(k)!r}" for k in names if now.get(k) != then.get(k)]
    if not changed:
        return
    problem = f"{checkpoint} is of a run with other settings: {'; '.join(changed)}"
    if not may_change:
        raise TrainingStateError(f"{problem}; use the old ones, or add --resume-with-changes")
    warnings.warn(problem, stacklevel=4)
