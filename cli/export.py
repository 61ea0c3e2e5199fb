"""``lowrank-ft export``: the compact checkpoint of a training checkpoint, or of a PEFT adapter."""

import argparse
import sys
from pathlib import Path

from lowrank_ft_cli.arguments import add_dtype, add_hub, add_output
from lowrank_ft_cli.asked import choose_output_dir

HELP = "write a compact checkpoint from a training checkpoint, a PEFT adapter or another tool's factors, or change its form"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        help="a run's checkpoints/step-N folder, a folder with adapter_config.json, or a compact checkpoint, also one on the Hub",
    )
    parser.add_argument(
        "--form", choices=("pivoted", "factors"), default="pivoted",
        help="how factors are stored: pivoted (smallest, format version 2) or factors (U and V, version 1) (default: pivoted)",
    )  # fmt: skip
    parser.add_argument(
        "--factor-names", metavar="NAMES",
        help="the checkpoint is of another tool, whose factors have these names: svd-llm, ab, or patterns of U, of V and of the "
        "linear, such as '*.B,*.A,*'",
    )  # fmt: skip
    parser.add_argument(
        "--base-model", metavar="MODEL",
        help="folder or Hub id of a PEFT adapter's base model (default: what adapter_config.json names; its Python code is "
        "never run)",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a compact checkpoint on the Hub")
    parser.add_argument("--token", help="Hub token (default: the stored one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code in the checkpoint")
    add_output(parser, "compact")
    add_dtype(parser)
    add_hub(parser)


def run(options: argparse.Namespace) -> None:
    choose_output_dir(options, options.checkpoint)

    from lowrank_ft_cli.options import dtype_of, hub_target, shard_size

    from lowrank_ft.checkpoints.files import weight_bytes
    from lowrank_ft.checkpoints.foreign import factor_names, load_foreign
    from lowrank_ft.checkpoints.from_training import load_adapter, load_compact, load_training_checkpoint
    from lowrank_ft.checkpoints.push import push
    from lowrank_ft.checkpoints.source import Source
    from lowrank_ft.console import human_bytes, shown_command
    from lowrank_ft.errors import CheckpointNotFoundError, ConfigError
    from lowrank_ft.export import save_compact

    source = Source(options.checkpoint, options.revision, options.trust_remote_code, options.token)
    shard_size(options)
    repo_id = hub_target(options)
    folder = source.download()
    base_model: str | None = None
    companions = folder
    is_adapter = options.factor_names is None and (folder / "adapter_config.json").is_file()
    if options.base_model is not None and not is_adapter:
        raise ConfigError(f"--base-model applies to a PEFT adapter, which {options.checkpoint} is not; leave it out")
    if options.factor_names is not None:
        model = load_foreign(folder, factor_names(options.factor_names), options.trust_remote_code)
    elif is_adapter:
        model, base_model, companions = load_adapter(folder, options.trust_remote_code, options.base_model)
    elif (folder / "trainer_state.json").is_file():
        model, base_model, companions = load_training_checkpoint(folder, options.trust_remote_code)
    elif (folder / "config.json").is_file():
        model, base_model, companions = load_compact(folder, options.trust_remote_code)
    else:
        raise CheckpointNotFoundError(
            f"{folder} is neither a training checkpoint (trainer_state.json) nor a PEFT adapter (adapter_config.json) "
            "nor a compact checkpoint (config.json)"
        )
    dtype = dtype_of(options)
    save_compact(
        model, options.output_dir, companions_from=companions, form=options.form,
        dtype=None if dtype == "auto" else dtype, base_model=base_model, overwrite=options.overwrite,
        max_shard_size=shard_size(options), command=shown_command("lowrank-ft", sys.argv[1:]),
    )  # fmt: skip
    if companions == folder and not is_adapter:
        before, after = (weight_bytes(Path(f)) for f in (folder, options.output_dir))
        print(f"weights   {human_bytes(before)} -> {human_bytes(after)} ({after / before - 1:+.1%})", file=sys.stderr)
    print(Path(options.output_dir))
    if repo_id is not None:
        print(push(options.output_dir, repo_id, private=options.private, token=options.token))
