"""``lowrank-ft merge``: a compact checkpoint, or a GGUF file, in, a plain dense one out."""

import argparse
import tempfile
from pathlib import Path

from lowrank_ft_cli.arguments import add_dtype, add_model, add_output
from lowrank_ft_cli.asked import check_models, choose_output_dir

HELP = "multiply U V back into dense weights, for software that reads only those"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "MODEL may be a GGUF file, too: its weights are written as numbers, in float32 unless --dtype says otherwise"
    )
    add_model(parser)
    add_output(parser, "merged")
    add_dtype(parser)


def run(options: argparse.Namespace) -> None:
    if options.model.lower().endswith(".gguf"):
        _unpack(options)
        return
    check_models(options.model)
    choose_output_dir(options, options.model)

    from lowrank_ft_cli.options import dtype_of, shard_size, source_of

    import lowrank_ft
    from lowrank_ft.checkpoints.architecture import is_compact
    from lowrank_ft.checkpoints.models import check_finite, load_model
    from lowrank_ft.errors import CheckpointError
    from lowrank_ft.export import save_dense

    source = source_of(options)
    shard_size(options)
    if not is_compact(source.load_config()):
        raise CheckpointError(f"{source.name} is dense already; merge takes what convert or finetune wrote")
    model = load_model(source, dtype_of(options))
    check_finite(model, source.name)
    save_dense(
        lowrank_ft.merge(model), options.output_dir, companions_from=source.download(), overwrite=options.overwrite,
        max_shard_size=shard_size(options),
    )  # fmt: skip
    print(Path(options.output_dir))


def _unpack(options: argparse.Namespace) -> None:
    """A dense checkpoint of a GGUF file, with the tokenizer that is in it."""
    path = Path(options.model).expanduser()
    choose_output_dir(options, path.stem)

    from lowrank_ft_cli.options import dtype_of, shard_size

    from lowrank_ft.checkpoints.gguf import load_gguf
    from lowrank_ft.export import save_dense

    shard_size(options)
    dtype = dtype_of(options)
    model, tokenizer = load_gguf(path, *([] if dtype == "auto" else [dtype]))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        save_dense(
            model, options.output_dir, companions_from=Path(folder), overwrite=options.overwrite,
            max_shard_size=shard_size(options),
        )  # fmt: skip
    print(Path(options.output_dir))
