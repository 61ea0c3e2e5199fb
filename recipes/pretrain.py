"""Train a model from scratch with low rank from its initialization on, guided by a dense branch at first.

    lowrank-ft tokenize texts/ --tokenizer TOKENIZER --output-dir tokens
    accelerate launch recipes/pretrain.py --preset wei2024-s-r32 --dataset tokens --gradient-accumulation-steps 64
    accelerate launch recipes/pretrain.py --config-name path/to/llama --rank 64 --dataset tokens --guide-mode stochastic

Self-guided training in its four forms: ``--guide-mode full`` (the dense branch always computed in the guided phase) or
``stochastic``, each at a fixed number of steps, or with ``--fixed-flops`` at the FLOPs of the dense model. What is left
in ``output_dir`` is a compact checkpoint that ``AutoModelForCausalLM`` loads.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel

import lowrank_ft
from lowrank_ft.checkpoints.names import local_folder
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.console import one_line_errors, shown_command
from lowrank_ft.data.encoding import tokenizer_facts
from lowrank_ft.data.examples import context_length
from lowrank_ft.data.token_format import is_token_folder, read_index
from lowrank_ft.data.tokens import check_embeddings
from lowrank_ft.errors import ConfigError
from lowrank_ft.export import save_dense
from lowrank_ft.factorization.plan import Plan
from lowrank_ft.factorization.targets import as_patterns
from lowrank_ft.pretraining.configs import build_causal_lm, config_with
from lowrank_ft.pretraining.options import PretrainArguments, ScratchArguments
from lowrank_ft.pretraining.presets import Preset, preset
from lowrank_ft.training import Trainer, checkpoint_to_resume, load_data, make_accelerator
from lowrank_ft.training.arguments import as_rank, parse_groups
from lowrank_ft.training.options import DataArguments
from lowrank_ft.training.preparation import folder_alone, prepare_folder, writes_explained

_OPTIONS_INSTEAD = {
    "rank": "--rank", "dense_first_block": "--no-dense-first-block", "tokens": "--max-steps",
    "sequences_per_step": "--per-device-train-batch-size and --gradient-accumulation-steps",
}  # fmt: skip
_NOT_THE_MODEL = ("transformers_version", "quantization_config", "_name_or_path")


@one_line_errors
def main() -> None:
    scratch, data_args, train_args = parse_groups((ScratchArguments, DataArguments, PretrainArguments), None, __doc__)
    if data_args.distill_dataset or train_args.distill_weight:
        raise ConfigError("from scratch there is no dense model to distil from; leave distill_weight and _dataset out")
    accelerator = make_accelerator(train_args)
    with folder_alone(train_args.output_dir, accelerator):
        train_and_export(scratch, data_args, train_args, accelerator)


def train_and_export(
    scratch: ScratchArguments, data_args: DataArguments, train_args: PretrainArguments, accelerator: Accelerator
) -> None:
    read = [local_folder(scratch.config_name)] if scratch.config_name else []
    checkpoint_to_resume(train_args, read)  # refuses a folder in use before any work is done

    # 1. The tokenizer decides how many embeddings there are, so it comes first; then the data.
    source = Source(tokenizer_name(scratch, data_args), trust_remote_code=scratch.trust_remote_code)
    checkpoint_to_resume(train_args, [source.folder, *read])
    folder, tokenizer = source.download(), source.load_tokenizer()
    config = build_config(scratch, tokenizer_facts(tokenizer, source.name)["vocab_size"])
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    positions = getattr(config, "max_position_embeddings", None)
    data_args.block_size = context_length(data_args.block_size, positions, "the model")
    with accelerator.local_main_process_first():
        train_data, eval_data = load_data(data_args, tokenizer)
    check_embeddings(config.vocab_size, train_data, eval_data)

    # 2. The model: fresh weights, their best approximation of low rank, and a dense branch that starts there.
    model, plan = build_model(scratch, config, train_args.seed)

    # 3. Train; at the end the guides are gone and the best weights are in place.
    trainer = Trainer(
        model, train_args, train_data, eval_data, accelerator, facts=run_facts(scratch, model.config, plan)
    )
    export_dtype = getattr(torch, scratch.export_dtype)
    checkpoint, _ = trainer.starting_point()  # a resumption that is refused leaves its folder as it was
    with writes_explained(train_args.output_dir):
        if accelerator.is_main_process:
            prepare_folder(train_args.output_dir, folder, export_dtype, checkpoint)
        trained = trainer.train()

        # 4. Export.
        if accelerator.is_main_process:
            results = {"training steps": trainer.max_steps, "guided steps": trainer.guided_steps}
            if trainer.best_loss is not None:
                results["held-out loss"] = f"{trainer.best_loss:.4f} nats per token"
            told = dict(
                companions_from=folder, results=results, command=shown_command("recipes/pretrain.py", sys.argv[1:])
            )
            if plan is None:
                save_dense(trained.to(export_dtype), train_args.output_dir, keep_existing=True, **told)
            else:
                lowrank_ft.save_compact(
                    trained, train_args.output_dir, dtype=export_dtype, from_scratch=True, keep_existing=True, **told
                )
            print(train_args.output_dir)


def tokenizer_name(scratch: ScratchArguments, data: DataArguments) -> str:
    """The tokenizer that was named, or else the one that made the token files."""
    if scratch.tokenizer_name:
        return scratch.tokenizer_name
    if is_token_folder(data.dataset):
        name = str(read_index(Path(data.dataset).expanduser())["tokenizer"]["name"])
        if "/" in name or Path(name).is_dir():
            return name
        raise ConfigError(
            f"{data.dataset} was made with a tokenizer from a folder {name!r}; name it with --tokenizer-name"
        )
    raise ConfigError("name the tokenizer with --tokenizer-name; only token files (lowrank-ft tokenize) know theirs")


def build_config(args: ScratchArguments, vocab_size: int) -> PreTrainedConfig:
    """The config of the model, with as many embeddings as the tokenizer needs unless an override says otherwise.

    Raises:
        ConfigError, RankError: no such preset or value; or values that contradict one another.
        CheckpointNotFoundError, CheckpointError: no such config, or one that cannot be.
    """
    overrides: dict[str, Any] = {"vocab_size": vocab_size, **dict(args.config_overrides or {})}
    if args.preset is not None:
        return lowrank_ft.preset_config(chosen_preset(args, **overrides))
    assert args.config_name is not None
    config = Source(args.config_name, trust_remote_code=args.trust_remote_code).load_config()
    return config_with(config, overrides)


def chosen_preset(args: ScratchArguments, **overrides: Any) -> Preset:
    """The preset with what the options say of it.

    Raises:
        ConfigError, RankError: see :func:`lowrank_ft.pretraining.presets.preset`; or an override that is an option of its own.
    """
    assert args.preset is not None
    for name in overrides:
        if name in _OPTIONS_INSTEAD:
            raise ConfigError(
                f"config_overrides: {name} is no part of the config; say it with {_OPTIONS_INSTEAD[name]}"
            )
    if args.rank is not None or args.param_ratio is not None:
        overrides["rank"] = as_rank(args.rank)
    overrides["dense_first_block"] = args.dense_first_block and args.target_modules is None
    return preset(args.preset, **overrides)


def build_model(args: ScratchArguments, config: PreTrainedConfig, seed: int) -> tuple[PreTrainedModel, Plan | None]:
    """A fresh model, with low rank and guides as asked; the plan is None for a dense one.

    Raises:
        ConfigError: options for factors, and no rank.
        RankError, TargetError: see :func:`lowrank_ft.initialize_lowrank`.
    """
    torch.manual_seed(seed)
    model = build_causal_lm(config, getattr(torch, args.dtype), args.trust_remote_code)
    rank = as_rank(args.rank)
    if rank is None and args.param_ratio is None and args.preset is not None:
        rank = chosen_preset(args, **dict(args.config_overrides or {})).rank
    if rank is None and args.param_ratio is None:
        named = [n for n in ("rank_pattern", "target_modules", "exclude_modules") if getattr(args, n)]
        if named:
            raise ConfigError(
                f"{named[0]} applies to low-rank models, and no rank is given; add --rank or --param-ratio"
            )
        return model, None
    plan = lowrank_ft.initialize_lowrank(
        model,
        rank=rank,
        param_ratio=args.param_ratio,
        rank_pattern=args.rank_pattern,
        target_modules=as_patterns(args.target_modules),
        exclude_modules=as_patterns(args.exclude_modules),
        dense_first_block=args.dense_first_block,
        guide=None if args.guide == "none" else args.guide,
        progress=True,
    )
    return model, plan


def run_facts(args: ScratchArguments, config: PreTrainedConfig, plan: Plan | None) -> dict[str, Any]:
    """What a resumed run must share, value by value, so that a difference can be named."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    described = {f"config.{k}": v for k, v in sorted(values.items()) if k not in _NOT_THE_MODEL}
    ranks = {} if plan is None else {f"rank of {name}": rank for name, rank in plan.ranks.items()}
    return {**described, **ranks, "guide": args.guide}


if __name__ == "__main__":
    main()
