"""Options of a training from scratch, see ``recipes/pretrain.py``."""

from dataclasses import dataclass

from lowrank_ft.errors import ConfigError, require_choice
from lowrank_ft.factorization.options import SizeOptions
from lowrank_ft.pretraining.initialize import FROM_SCRATCH_GUIDES
from lowrank_ft.schedule import GUIDE_MODES
from lowrank_ft.training.options import TrainArguments, check_trained_dtype, option, shared

GUIDES = (*FROM_SCRATCH_GUIDES, "none")


@dataclass
class ScratchArguments:
    """What is trained from scratch, and whether a guide helps it."""

    preset: str | None = option(
        None, "a published model, with its rank, such as wei2024-s-r32; lowrank-ft plan --help names them"
    )
    config_name: str | None = option(None, "any other causal language model: folder with a config.json, or Hub id")
    config_overrides: dict | str | None = option(
        None, "values of the config to change: {num_hidden_layers: 4, hidden_size: 256}"
    )
    tokenizer_name: str | None = option(
        None, "folder or Hub id of the tokenizer; default: the one that made the token files"
    )
    trust_remote_code: bool = option(False, "run the Python code that comes with the config")
    rank: float | str | None = option(
        None, "rank of the factors; default: the preset's. No rank trains the dense model"
    )
    param_ratio: float | None = option(None, "share of the linears' parameters to keep, instead of rank")
    rank_pattern: dict | str | None = option(None, "ranks of linears that differ, as in PEFT: {up_proj: 64}")
    target_modules: list[str] | None = option(
        None, "names or suffixes of the linears that get a low rank, as in PEFT; default: those of the FFN"
    )
    exclude_modules: list[str] | None = shared(SizeOptions, "exclude_modules")
    dense_first_block: bool = option(True, "leave the targeted linears of the first block dense")
    guide: str = option(
        "dense", "dense: a trained dense branch that starts at U V and is phased out; none: the factors alone"
    )
    dtype: str = option("float32", "dtype of the trained weights: float32, bfloat16")
    export_dtype: str = option("float32", "dtype of the exported weights: float32, bfloat16, float16")

    def __post_init__(self) -> None:
        require_choice("guide", self.guide, GUIDES)
        check_trained_dtype(self.dtype)
        require_choice("export_dtype", self.export_dtype, ("float32", "bfloat16", "float16"))
        if (self.preset is None) == (self.config_name is None):
            raise ConfigError("say what to train with either --preset or --config-name")
        if self.rank is not None and self.param_ratio is not None:
            raise ConfigError("give rank or param_ratio, not both")


@dataclass
class PretrainArguments(TrainArguments):
    """How it is trained: the options of fine-tuning, with the habits of training from scratch."""

    output_dir: str = option("out/pretrained", "folder for the compact checkpoint and the records of the run")
    learning_rate: float = option(6e-4, "peak learning rate of AdamW")
    warmup_ratio: float = option(0.01, "share of the steps in which the learning rate rises")
    weight_decay: float = option(0.1, "weight decay of all weights; without decay_vectors of matrices only")
    decay_vectors: bool = option(True, "also apply weight decay to norms and biases")
    adam_beta2: float = option(0.95, "beta2 of AdamW")
    guided_ratio: float | None = option(
        None,
        "share of the steps that use the guide; default: 0.5, or with fixed_flops such that each guided step "
        "is repeated once",
    )
    guide_mode: str = option(
        "full",
        "full: every guide in every guided step; stochastic: each with probability alpha, at half the cost",
    )
    fixed_flops: bool = option(
        False, "add unguided steps on the data of the guided phase until the run costs as much as dense training"
    )

    def __post_init__(self) -> None:
        require_choice("guide_mode", self.guide_mode, GUIDE_MODES)
        if self.fixed_flops and self.distill_weight:
            raise ConfigError(
                f"fixed_flops and distill_weight {self.distill_weight} exclude each other: the dense run has no teacher "
                "whose FLOPs could be matched; leave one of them out"
            )
        if self.fixed_flops and self.trainable != "all":
            raise ConfigError(
                f"fixed_flops counts a run in which every linear is trained, and trainable is {self.trainable}; "
                "leave one of them out"
            )
        if self.guided_ratio is None and not self.fixed_flops:
            self.guided_ratio = 0.5
        super().__post_init__()
