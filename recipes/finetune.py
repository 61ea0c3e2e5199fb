"""Fine-tune a low-rank model while its dense weight is phased out, and export the result.

    accelerate launch recipes/finetune.py --config recipes/configs/finetune.yaml
    accelerate launch recipes/finetune.py --config recipes/configs/finetune.yaml --learning_rate 1e-4

The model is a compact checkpoint (from ``lowrank-ft convert``), or a dense one with ``--rank`` or ``--param_ratio``.
What is left in ``output_dir`` at the end is a compact checkpoint that ``AutoModelForCausalLM`` loads.
"""

import sys

import torch
from transformers import PreTrainedModel

import lowrank_ft
from lowrank_ft.console import one_line_errors, shown_command
from lowrank_ft.errors import ConfigError
from lowrank_ft.evaluation import context_length
from lowrank_ft.hub.export import begin_run
from lowrank_ft.hub.source import Source, check_causal_lm, check_finite, is_compact, load_model
from lowrank_ft.targets import as_patterns
from lowrank_ft.training import ModelArguments, Trainer, checkpoint_to_resume, load_data, make_accelerator
from lowrank_ft.training.arguments import as_rank, parse_args


@one_line_errors
def main() -> None:
    model_args, data_args, train_args = parse_args(description=__doc__)
    source = Source(model_args.model, model_args.revision, model_args.trust_remote_code)

    checkpoint_to_resume(train_args)  # refuses a folder in use before any work is done

    # 1. The data first: a misspelt column should not cost the time of a conversion.
    config = source.load_config()
    check_causal_lm(config, source)
    folder = source.download()
    tokenizer = source.load_tokenizer()
    positions = getattr(config, "max_position_embeddings", None)
    data_args.block_size = context_length(data_args.block_size, positions, source.name)
    accelerator = make_accelerator(train_args)
    with accelerator.main_process_first():
        train_data, eval_data = load_data(data_args, tokenizer)

    # 2. The model: factors, and the guide beside them.
    with accelerator.main_process_first():
        model, base_model = prepare_model(model_args, source)

    export_dtype = config.dtype if model_args.export_dtype == "auto" else getattr(torch, model_args.export_dtype)
    export_dtype = export_dtype or torch.float32

    # 3. Train; at the end the guides are gone and the best weights are in place.
    trainer = Trainer(model, train_args, train_data, eval_data, accelerator)
    if accelerator.is_main_process:
        begin_run(train_args.output_dir, folder, export_dtype)
    trainer.train()

    # 4. Export.
    if accelerator.is_main_process:
        results = {"training steps": trainer.max_steps, "guide": f"{model_args.guide}, {trainer.guided_steps} steps"}
        if trainer.best_loss is not None:
            results["held-out loss"] = f"{trainer.best_loss:.4f} nats per token"
        lowrank_ft.save_compact(
            model.to(export_dtype), train_args.output_dir, companions_from=folder, base_model=base_model,
            results=results, command=shown_command("recipes/finetune.py", sys.argv[1:]), keep_existing=True,
        )  # fmt: skip
        print(train_args.output_dir)


def prepare_model(args: ModelArguments, source: Source) -> tuple[PreTrainedModel, str]:
    """The model with its guides in the dtype of training, and the name of the dense model that it came from."""
    dtype = getattr(torch, args.dtype)
    guide = None if args.guide == "none" else args.guide
    sizes = (args.rank, args.param_ratio)
    compact = is_compact(source.load_config())
    if compact and any(s is not None for s in sizes):
        raise ConfigError(
            f"{source.name} is compact already; leave --rank and --param_ratio out, or name a dense model"
        )
    if not compact and all(s is None for s in sizes):
        raise ConfigError(f"{source.name} is dense; say how small it should become with --rank or --param_ratio")

    model = load_model(source, dtype)
    if not compact:
        check_finite(model)
        lowrank_ft.convert(
            model,
            rank=as_rank(args.rank),
            param_ratio=args.param_ratio,
            rank_pattern=args.rank_pattern,
            target_modules=as_patterns(args.target_modules),
            exclude_modules=as_patterns(args.exclude_modules),
            guide=guide,
            progress=True,
        )
        return model, source.name

    origin = model.config.quantization_config
    base_model = args.guide_model or origin.base_model
    if guide is not None:
        if not base_model:
            raise ConfigError(
                f"{source.name} does not say which dense model it came from; name it with --guide_model, "
                "or train without a guide: --guide none"
            )
        # A checkpoint may name any repository as its origin; code from there runs only if the user named it.
        named = args.guide_model is not None
        revision = None if named else origin.base_revision
        dense = load_model(Source(base_model, revision, args.trust_remote_code and named), dtype)
        lowrank_ft.attach_guides(model, dense, guide)
    return model, base_model


if __name__ == "__main__":
    main()
