"""Options of a fine-tuning run. Names are those of transformers and PEFT where they have one."""

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from lowrank_ft.conversion.blockwise import METHODS
from lowrank_ft.conversion.effort import EFFORTS
from lowrank_ft.errors import ConfigError, require_choice
from lowrank_ft.factorization.allocation import ALLOCATIONS
from lowrank_ft.factorization.options import SizeOptions
from lowrank_ft.nn import GUIDES, check_guide_bits
from lowrank_ft.schedule import ALPHA_SCHEDULES, LR_SCHEDULES
from lowrank_ft.training.optimizers import OPTIMIZERS
from lowrank_ft.training.trainable import TRAINABLE

AUTO_GUIDE_FROM = 0.4  # param ratio; see docs/explanation/guidance.md
MOST_EXAMPLES = 2**16
"""The most in one forward pass. A batch is a list with one entry per example, so a mistyped size would fill the memory."""
MOST_PASSES = 2**20


def option(default: Any, help: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def shared(declared: Any, name: str) -> Any:
    """An option that the command line has, too: the same default, the same words."""
    found = next(f for f in fields(declared) if f.name == name)
    return option(found.default, found.metadata["help"])


@dataclass
class ModelArguments:
    """What is trained, and what guides it."""

    model: str = option("", "compact checkpoint, or a dense one with rank or param_ratio; folder or Hub id")
    revision: str | None = option(None, "branch, tag or commit of the model on the Hub")
    trust_remote_code: bool = option(False, "run the Python code in the checkpoint")
    adapter: bool = option(False, "merge the PEFT adapter in the same folder into the weights")
    rank: float | str | None = option(None, "rank for a dense model: a whole number, or a fraction of full rank (1.0)")
    param_ratio: float | None = option(None, "share of the linears' parameters to keep, for a dense model")
    rank_pattern: dict | str | None = option(None, "ranks of linears that differ, as in PEFT: {q_proj: 64}")
    target_modules: list[str] | None = shared(SizeOptions, "target_modules")
    exclude_modules: list[str] | None = shared(SizeOptions, "exclude_modules")
    method: str = option(EFFORTS["default"].method, f"how factors of a dense model are found: {', '.join(METHODS)}")
    allocation: str | None = option(
        None,
        f"how the parameters are distributed over the linears: {', '.join(ALLOCATIONS)}; default: loss with param_ratio, else "
        "uniform",
    )
    calibration_tokens: int = option(
        65_536, "tokens of the training data that the factors of a dense model are fitted to"
    )
    guide: str = option(
        "auto",
        f"dense branch that is phased out: {', '.join(GUIDES)}, none; auto: residual where at least {AUTO_GUIDE_FROM:g} of "
        "the linears' parameters are left, else none",
    )
    guide_bits: int | None = option(
        None, "4: store a residual guide in 4 bits, which needs bitsandbytes; default: as --dtype"
    )
    guide_model: str | None = option(
        None, "dense model of the guide and of distillation; default: the one the checkpoint was made from"
    )
    dtype: str = option("float32", "dtype of the trained weights: float32, bfloat16")
    export_dtype: str = option("auto", "dtype of the exported weights; auto: that of the source checkpoint")

    def __post_init__(self) -> None:
        require_choice("method", self.method, METHODS)
        if self.allocation is not None:
            require_choice("allocation", self.allocation, ALLOCATIONS)
        _require_range("calibration_tokens", self.calibration_tokens, 1)
        require_choice("guide", self.guide, (*GUIDES, "none", "auto"))
        check_guide_bits(self.guide_at(1.0), self.guide_bits)
        check_trained_dtype(self.dtype)
        require_choice("export_dtype", self.export_dtype, ("auto", "float32", "bfloat16", "float16"))

    def guide_at(self, param_ratio: float) -> str | None:
        """The guide of a model whose linears keep this share of their parameters; None for no guide.

        ``auto`` is what tests/benchmarks/guides.py found: a residual guide helps where moderately much was taken away,
        and hinders where little is left.
        """
        if self.guide == "auto":
            return "residual" if param_ratio >= AUTO_GUIDE_FROM else None
        return None if self.guide == "none" else self.guide


@dataclass
class DataArguments:
    """What it is trained on."""

    dataset: str = option(
        "", "datasets name on the Hub, a local .txt, .md, .jsonl, .json or .parquet file, or a folder of token files"
    )
    dataset_config: str | None = option(None, "configuration of a dataset on the Hub")
    dataset_split: str = option("train", "split of the dataset on the Hub")
    eval_dataset: str | None = option(None, "like dataset; default: the last eval_ratio of the training data")
    eval_config: str | None = option(
        None,
        "configuration of eval_dataset, if that is on the Hub; default: dataset_config where it is the same dataset",
    )
    eval_split: str = option("validation", "split of eval_dataset, if that is on the Hub")
    eval_ratio: float = option(
        0.1, "share held out for evaluation, if there is neither an eval_dataset nor a held-out part; 0: none"
    )
    distill_dataset: str | None = option(
        None, "like dataset: general text for distillation; default: the training data"
    )
    distill_config: str | None = option(None, "configuration of distill_dataset, if that is on the Hub")
    distill_split: str = option("train", "its split, such as train[:10000]; all of it is tokenized at the start")
    text_column: str = option("text", "column that holds plain text")
    messages_column: str = option("messages", "column that holds chats, lists of {role, content}; used if it exists")
    block_size: int | None = option(
        None, "tokens per sequence of text, and at most per chat; default: 1024, or the limit of the model"
    )
    strict_data: bool = option(False, "stop at the first row that cannot be used, instead of leaving it out")
    dataset_num_proc: int | None = option(
        None, "processes that tokenize, on each node; default: one, or all cores up to 8 for 10,000 rows and more"
    )

    def __post_init__(self) -> None:
        _require_range("eval_ratio", self.eval_ratio, 0, 0.9)
        if self.dataset_num_proc is not None:
            _require_range("dataset_num_proc", self.dataset_num_proc, 1)
        if self.block_size is not None:
            _require_range("block_size", self.block_size, 2)


@dataclass
class TrainArguments:
    """How it is trained."""

    output_dir: str = option("out/finetuned", "folder for the compact checkpoint and the records of the run")
    overwrite_output_dir: bool = option(
        False, "replace the files of an earlier run or of a compact checkpoint in output_dir"
    )
    resume_from_checkpoint: str | None = option(
        None, "auto (the newest checkpoint in output_dir; without a run there, start one), or the path of a checkpoint"
    )
    resume_with_changes: bool = option(
        False, "resume although settings differ from those of the checkpoint; the differences are shown"
    )
    max_steps: int = option(-1, "optimizer steps; -1: as num_train_epochs says")
    num_train_epochs: float = option(1.0, "passes over the data")
    per_device_train_batch_size: int = option(8, "sequences or chats per process and forward pass")
    per_device_eval_batch_size: int = option(8, "sequences or chats per process and forward pass in evaluation")
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step")
    optim: str = option("adamw_torch", f"form of AdamW: {', '.join(OPTIMIZERS)}; most of them need bitsandbytes")
    trainable: str = option(
        "all", f"what is trained: {', '.join(TRAINABLE)}; all but the first leave the other weights as they are"
    )
    lora_r: int = option(16, "rank of the adapters on U and V under --trainable lora or leading")
    lora_alpha: int = option(32, "scale of these adapters is lora_alpha / lora_r; with leading it is 1")
    learning_rate: float = option(5e-5, "peak learning rate of AdamW; small models take more")
    lr_scheduler_type: str = option("cosine", f"decay after the warm-up: {', '.join(LR_SCHEDULES)}")
    warmup_ratio: float = option(0.03, "share of the steps in which the learning rate rises")
    weight_decay: float = option(0.01, "weight decay of matrices; with decay_vectors of all weights")
    decay_vectors: bool = option(False, "also apply weight decay to norms and biases")
    adam_beta1: float = option(0.9, "beta1 of AdamW")
    adam_beta2: float = option(0.999, "beta2 of AdamW")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: never")
    alpha_schedule: str = option("cosine", f"how the guide's share falls from 1 to 0: {', '.join(ALPHA_SCHEDULES)}")
    guided_ratio: float | None = option(0.25, "share of the steps that use the guide")
    distill_weight: float = option(0.0, "share w of distillation in the loss: (1-w) cross-entropy + w T^2 KL; 0: none")
    distill_temperature: float = option(1.0, "T: the logits of both models are divided by it before the KL")
    mixed_precision: str | None = option(None, "no, bf16 or fp16; default: what accelerate is configured for")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    torch_compile: bool = option(False, "compile the model with torch.compile")
    torch_compile_backend: str = option("inductor", "backend of torch.compile")
    seed: int = option(42, "seed for the order of the data and for dropout")
    logging_steps: int = option(10, "steps between two records of the loss")
    eval_steps: int = option(0, "steps between evaluations; 0: only at the end")
    save_steps: int = option(500, "steps between checkpoints to resume from; 0: none")
    save_total_limit: int = option(2, "checkpoints to keep")
    load_best_model_at_end: bool = option(True, "export the weights of the best evaluation, not the last ones")
    report_to: list[str] = option([], "trackers of accelerate, such as tensorboard or wandb")
    run_name: str = option("lowrank-ft", "name of the run for the trackers")

    # The training loop reads both. Without annotations they are no options here; PretrainArguments makes them options.
    guide_mode = "full"
    fixed_flops = False

    def __post_init__(self) -> None:
        self.output_dir = os.path.expanduser(self.output_dir)  # or there would be a folder of that name
        if not self.output_dir:
            raise ConfigError("output_dir is empty; name a folder")
        require_choice("optim", self.optim, OPTIMIZERS)
        require_choice("trainable", self.trainable, TRAINABLE)
        require_choice("lr_scheduler_type", self.lr_scheduler_type, LR_SCHEDULES)
        require_choice("alpha_schedule", self.alpha_schedule, ALPHA_SCHEDULES)
        if self.mixed_precision is not None:
            require_choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            _require_range(name, getattr(self, name), 1, MOST_EXAMPLES)
        _require_range("gradient_accumulation_steps", self.gradient_accumulation_steps, 1, MOST_PASSES)
        _require_range("lora_r", self.lora_r, 1, MOST_EXAMPLES)
        _require_range("lora_alpha", self.lora_alpha, 1)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        _require_range("seed", self.seed, 0, 2**32 - 1)
        for name in ("logging_steps", "eval_steps", "save_steps", "weight_decay", "max_grad_norm"):
            _require_range(name, getattr(self, name), 0)
        _require_range("learning_rate", self.learning_rate, 0)
        _require_range("warmup_ratio", self.warmup_ratio, 0, 1)
        if self.guided_ratio is not None:
            _require_range("guided_ratio", self.guided_ratio, 0, 1)
        _require_range("distill_weight", self.distill_weight, 0, 1)
        if not 0 < self.distill_temperature < math.inf:
            raise ConfigError(f"distill_temperature is {self.distill_temperature}; it must be above 0 and finite")
        _require_range("save_total_limit", self.save_total_limit, 1)
        if self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError(
                f"max_steps is {self.max_steps}; it must be 1 or more, or -1 for num_train_epochs to decide"
            )
        if not 0 < self.num_train_epochs < math.inf:
            raise ConfigError(f"num_train_epochs is {self.num_train_epochs}; it must be above 0 and finite")


def check_trained_dtype(dtype: str) -> None:
    """Refuse a dtype in which AdamW cannot train.

    Raises:
        ConfigError: it is float16, or none that is known.
    """
    if dtype == "float16":  # the 1e-8 in AdamW's denominator is 0 there, and the first step gives NaN
        raise ConfigError(
            "dtype is float16, in which AdamW divides by 0; it must be float32 or bfloat16, and --mixed-precision fp16 "
            "computes in float16"
        )
    require_choice("dtype", dtype, ("float32", "bfloat16"))


def option_names(*classes: type) -> list[str]:
    """All option names of the dataclasses, for messages about unknown ones."""
    return [f.name for c in classes for f in fields(c)]


def _require_range(name: str, value: float, least: float, most: float | None = None) -> None:
    # Written so that NaN is out of any range; and no option may be infinite.
    if not least <= value < math.inf or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise ConfigError(f"{name} is {value}; it must be {allowed}")
