"""What a run needs before its first step: where it goes on from, its Accelerator, its optimizer."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lowrank_ft.errors import ConfigError, OutputError
from lowrank_ft.nn import guided_layers
from lowrank_ft.training import checkpoints, sharding
from lowrank_ft.training.config import TrainArguments
from lowrank_ft.training.records import METRICS_FILE


def checkpoint_to_resume(args: TrainArguments) -> Path | None:
    """The checkpoint that the options mean, or None for a fresh start.

    Raises:
        TrainingStateError: it does not exist.
        OutputError: ``output_dir`` holds an earlier run, and neither resuming nor overwriting was asked for.
    """
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint:
        return checkpoints.resolve_checkpoint(folder, args.resume_from_checkpoint)
    used = [p for p in (folder / METRICS_FILE, folder / "config.json") if p.exists()]
    if used and not args.overwrite_output_dir:
        raise OutputError(
            f"{folder} holds an earlier run ({used[0].name}); add --resume_from_checkpoint auto to go on, "
            "--overwrite_output_dir to start anew, or name another --output_dir"
        )
    return None


def make_accelerator(args: TrainArguments) -> Accelerator:
    """The Accelerator of a run. Accumulation is the trainer's own, because its loss is normalized by tokens.

    Raises:
        ConfigError: the launcher is configured for something that is not supported.
    """
    sharding.refuse_deepspeed()  # before accelerate asks for a package that would not help
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=args.report_to or None,
            project_dir=args.output_dir,
        )
        # The launcher's setting would divide every loss once more.
        accelerator.gradient_accumulation_steps = 1
        sharding.set_up(accelerator)
        return accelerator
    except ValueError as error:  # an unknown tracker, or a precision that the device lacks
        raise ConfigError(f"accelerate refuses these settings: {str(error).splitlines()[0]}") from error


def make_optimizer(model: nn.Module, args: TrainArguments) -> torch.optim.AdamW:
    """AdamW over everything that has a gradient: matrices, vectors (no weight decay), and trainable guides last."""
    guide_ids = {id(p) for _, layer in guided_layers(model) for p in layer.guide.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("no parameter of the model has requires_grad set; there is nothing to train")
    own: list[Tensor] = [p for p in trainable if id(p) not in guide_ids]
    groups = [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trainable if id(p) in guide_ids], "weight_decay": args.weight_decay},
    ]
    # torch refuses no empty group, and the last one is empty where guides are frozen or gone.
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2))
