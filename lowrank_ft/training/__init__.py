"""Fine-tuning on Accelerate while the dense weight is phased out."""

from lowrank_ft.training.config import DataArguments, ModelArguments, TrainArguments
from lowrank_ft.training.data import load_data
from lowrank_ft.training.trainer import Trainer, checkpoint_to_resume, make_accelerator

__all__ = [
    "DataArguments",
    "ModelArguments",
    "TrainArguments",
    "Trainer",
    "checkpoint_to_resume",
    "load_data",
    "make_accelerator",
]
