"""Fine-tune a low-rank model while its dense weight is phased out, and export the result.

    lowrank-ft finetune --model compact --dataset train.jsonl --output-dir finetuned
    lowrank-ft finetune --config run.yaml --learning-rate 1e-4 -- --multi_gpu --num_processes 8
    accelerate launch recipes/finetune.py --config recipes/configs/finetune.yaml

The model is a compact checkpoint (from ``lowrank-ft convert``), or a dense one with ``--rank`` or ``--param-ratio``.
What is left in ``output_dir`` at the end is a compact checkpoint that ``AutoModelForCausalLM`` loads.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, PreTrainedModel

import lowrank_ft
from lowrank_ft.checkpoints.architecture import check_causal_lm, is_compact, refuse_quantized
from lowrank_ft.checkpoints.models import check_finite, load_model
from lowrank_ft.checkpoints.names import is_hub_id, local_folder
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.console import one_line_errors, shown_command
from lowrank_ft.conversion.batches import training_calibration
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.convert import allocate, default_allocation
from lowrank_ft.conversion.restore import shape_factors, shape_guides
from lowrank_ft.costs.flops import compare
from lowrank_ft.data.examples import TokenizedData, context_length
from lowrank_ft.data.tokens import check_embeddings
from lowrank_ft.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from lowrank_ft.factorization.remainder import notes
from lowrank_ft.factorization.targets import as_patterns
from lowrank_ft.nn import check_guide_bits, guided_layers
from lowrank_ft.training import (
    DataArguments,
    ModelArguments,
    TrainArguments,
    Trainer,
    checkpoint_to_resume,
    load_data,
    load_distill_data,
    make_accelerator,
)
from lowrank_ft.training.arguments import as_rank, parse_args
from lowrank_ft.training.fsdp import uses_fsdp
from lowrank_ft.training.preparation import folder_alone, prepare_folder, writes_explained
from lowrank_ft.training.progress import outline


@one_line_errors
def main() -> None:
    model_args, data_args, train_args = parse_args(description=__doc__)
    accelerator = make_accelerator(train_args)
    with folder_alone(train_args.output_dir, accelerator):
        train_and_export(model_args, data_args, train_args, accelerator)


def train_and_export(
    model_args: ModelArguments, data_args: DataArguments, train_args: TrainArguments, accelerator: Accelerator
) -> None:
    source = Source(model_args.model, model_args.revision, model_args.trust_remote_code, adapter=model_args.adapter)
    source.check_adapter()

    # Refuses a folder in use before any work is done.
    checkpoint_to_resume(train_args, folders_read(model_args))

    # 1. The data first: a misspelt column should not cost the time of a conversion.
    config = source.load_config()
    checkpoint = checkpoint_to_resume(train_args, folders_read(model_args, config))
    check_causal_lm(config, source)
    refuse_quantized(config, source.name)
    folder = source.download()
    tokenizer = source.load_tokenizer()
    positions = getattr(config, "max_position_embeddings", None)
    data_args.block_size = context_length(data_args.block_size, positions, source.name)
    check_guide_bits(model_args.guide_at(1.0), model_args.guide_bits, accelerator.device)
    with accelerator.local_main_process_first():
        train_data, eval_data = load_data(data_args, tokenizer)
        distill_data = load_distill_data(data_args, tokenizer)
    check_embeddings(config.get_text_config().vocab_size, train_data, eval_data, distill_data)

    # 2. The model: factors, and the guide beside them; and the dense model, if there is something to distil from it.
    #    All processes do this at the same time: those that waited for a long conversion would time out. What FSDP2
    #    is going to shard may be too large for one device.
    distill = train_args.distill_weight > 0
    device = "cpu" if uses_fsdp(accelerator) else str(accelerator.device)
    model, base_model, teacher = prepare_model(model_args, source, train_data, distill, checkpoint, device)

    guide = next((layer.kind for _, layer in guided_layers(model)), "none")

    export_dtype = config.dtype if model_args.export_dtype == "auto" else getattr(torch, model_args.export_dtype)
    export_dtype = export_dtype or torch.float32

    # 3. Train; at the end the guides are gone and the best weights are in place.
    trainer = Trainer(
        model, train_args, train_data, eval_data, accelerator, teacher=teacher, distill_data=distill_data,
        facts=conversion_facts(model_args),
    )  # fmt: skip
    checkpoint, _ = trainer.starting_point()  # a resumption that is refused leaves its folder as it was
    with writes_explained(train_args.output_dir):
        if accelerator.is_main_process:
            line = outline(train_data, eval_data, trainer.global_batch, trainer.max_steps)
            print(f"{line}; guide {guide} for {trainer.guided_steps:,} steps", file=sys.stderr)
            prepare_folder(train_args.output_dir, folder, export_dtype, checkpoint)
        model = trainer.train()
        assert isinstance(model, PreTrainedModel)

        # 4. Export.
        if accelerator.is_main_process:
            name = data_args.dataset if is_hub_id(data_args.dataset) else Path(data_args.dataset).name
            results = {
                "training steps": trainer.max_steps,
                "guide": f"{guide}, {trainer.guided_steps} steps",
                "dataset": name,
            }
            if trainer.best_loss is not None:
                results["held-out loss"] = f"{trainer.best_loss:.4f} nats per token"
            if trainer.best_step == 0 and train_args.load_best_model_at_end:
                results["note"] = "no step was better than the start: these are the weights before training"
            lowrank_ft.save_compact(
                model, train_args.output_dir, dtype=export_dtype, companions_from=folder, base_model=base_model,
                results=results, command=shown_command("recipes/finetune.py", sys.argv[1:]), keep_existing=True,
            )  # fmt: skip
            print(train_args.output_dir)


def prepare_model(
    args: ModelArguments,
    source: Source,
    train_data: TokenizedData,
    distill: bool = False,
    checkpoint: Path | None = None,
    device: str = "cpu",
) -> tuple[PreTrainedModel, str, PreTrainedModel | None]:
    """The model with its guides in the dtype of training, the name of the dense model that it came from, the teacher.

    The teacher, None unless there is distillation, is a whole dense model of its own, in the same dtype. A run that
    goes on from a ``checkpoint`` finds factors and guides there: here they get their shapes, and nothing is computed.
    What is computed, such as factors of a dense model, is on ``device``.
    """
    dtype = getattr(torch, args.dtype)
    sizes = (args.rank, args.param_ratio)
    compact = is_compact(source.load_config())
    if compact and any(s is not None for s in sizes):
        raise ConfigError(
            f"{source.name} is compact already; leave --rank and --param-ratio out, or name a dense model"
        )
    if not compact and all(s is None for s in sizes):
        raise ConfigError(f"{source.name} is dense; say how small it should become with --rank or --param-ratio")

    model = load_model(source, dtype, device)
    check_finite(model, source.name)
    origin: Any = getattr(model.config, "quantization_config", None)  # unpivot writes this entry anew, as a dictionary
    lowrank_ft.unpivot(model)
    if not compact:
        teacher = None
        if distill:
            teacher = (
                load_dense(args, args.guide_model, None, distill, device) if args.guide_model else copy.deepcopy(model)
            )
        sizes_and_targets: dict[str, Any] = dict(
            rank=as_rank(args.rank),
            param_ratio=args.param_ratio,
            rank_pattern=args.rank_pattern,
            target_modules=as_patterns(args.target_modules),
            exclude_modules=as_patterns(args.exclude_modules),
        )
        plan = lowrank_ft.make_plan(model, **sizes_and_targets)
        for note in notes(model, plan):
            PartialState().print(f"note: {note}", file=sys.stderr)
        guide = args.guide_at(plan.param_ratio)
        if checkpoint is not None:
            shape_factors(model, checkpoint)
            if guide is not None:
                shape_guides(model, guide, args.guide_bits)
            return model, source.name, teacher
        calibration = calibration_of(args, train_data)
        allocation = args.allocation or default_allocation(args.param_ratio, calibration is not None)
        plan = allocate(model, plan, allocation, calibration, progress=True)
        # Sums on GPUs differ from one process to the next in their last digits, and ranks may follow; DDP needs equal shapes.
        plan = broadcast_object_list([plan])[0]
        lowrank_ft.convert(
            model,
            plan=plan,
            guide=guide,
            guide_bits=args.guide_bits if guide else None,
            method=args.method,
            calibration=calibration,
            progress=True,
        )
        return model, source.name, teacher

    base_model = args.guide_model or origin.base_model
    guide = args.guide_at(compare(model).kept)
    if args.guide == "auto" and not base_model:
        guide = None
    if guide is None and not distill:
        return model, base_model, None
    if not base_model:
        raise ConfigError(
            f"{source.name} does not say which dense model it came from; name it with --guide-model, "
            "or train without guide and distillation: --guide none --distill-weight 0"
        )
    if checkpoint is not None and guide is not None and not distill:
        shape_guides(model, guide, args.guide_bits)
        return model, base_model, None
    dense = load_dense(args, base_model, None if args.guide_model else origin.base_revision, distill, device)
    if guide is not None:
        lowrank_ft.attach_guides(model, dense, guide, args.guide_bits)
    else:  # a teacher may be any model of the same vocabulary, and then it is not where the factors came from
        base_model = origin.base_model or base_model
    return model, base_model, dense if distill else None


def folders_read(args: ModelArguments, config: Any = None) -> list[Path | None]:
    """The folders of the model, of that which guides and teaches, and of the one that ``config`` says it was made from."""
    origin = getattr(config, "quantization_config", None) or {}
    base_model = origin.get("base_model") if isinstance(origin, dict) else getattr(origin, "base_model", None)
    return [local_folder(name) for name in (args.model, args.guide_model, base_model) if isinstance(name, str)]


def conversion_facts(args: ModelArguments) -> dict[str, Any]:
    """What factors of a dense model were made by, none of it for a compact one: a resumed run takes them as they are."""
    if args.rank is None and args.param_ratio is None:
        return {}
    names = ("param_ratio", "rank_pattern", "target_modules", "exclude_modules", "method", "allocation")
    return {"rank": as_rank(args.rank), **{name: getattr(args, name) for name in names}}


def calibration_of(args: ModelArguments, train_data: TokenizedData) -> Calibration | None:
    """The training text, for fitting factors to it; what training does better itself is left to it."""
    if args.method == "svd" and args.allocation in (None, "uniform"):
        return None
    return training_calibration(train_data, args.calibration_tokens)


def load_dense(
    args: ModelArguments, name: str, revision: str | None, teaches: bool, device: str = "cpu"
) -> PreTrainedModel:
    """The dense model of the guide, and of distillation where it ``teaches``: a guide needs no head, a teacher does."""
    # A checkpoint may name any repository as its origin; code from there runs only if the user named it.
    source = Source(name, revision, args.trust_remote_code and args.guide_model is not None)
    try:
        if teaches:
            check_causal_lm(source.load_config(), source)
        return load_model(source, getattr(torch, args.dtype), device)
    except CheckpointNotFoundError as error:
        if args.guide_model is not None:
            raise
        # The name is one that the checkpoint holds, and that the user may never have seen.
        problem = "is not here" if not is_hub_id(name) and source.folder is None else f"cannot be loaded: {error}"
        without = "--guide none --distill-weight 0" if teaches else "--guide none"
        raise CheckpointNotFoundError(
            f"{'distillation' if teaches else 'the guide'} needs the dense model that {args.model} was made from, which was "
            f"{name} and {problem}; name it with --guide-model MODEL, or train without it: {without}"
        ) from error
    except CheckpointError as error:
        withheld = args.trust_remote_code and not source.trust_remote_code
        if withheld and PreTrainedConfig.get_config_dict(name, revision=revision)[0].get("auto_map"):
            raise ConfigError(
                f"{name}, from which {args.model} says that it came, needs its own Python code; if you trust its "
                f"author, name it yourself: --guide-model {name}"
            ) from error
        raise


if __name__ == "__main__":
    main()
