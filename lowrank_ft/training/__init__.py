"""Fine-tuning on Accelerate while the dense weight is phased out."""

from lowrank_ft.training.data import load_data, load_distill_data
from lowrank_ft.training.options import DataArguments, ModelArguments, TrainArguments
from lowrank_ft.training.preparation import checkpoint_to_resume, make_accelerator
from lowrank_ft.training.trainer import Trainer

__all__ = [
    "DataArguments",
    "ModelArguments",
    "TrainArguments",
    "Trainer",
    "checkpoint_to_resume",
    "load_data",
    "load_distill_data",
    "make_accelerator",
]
