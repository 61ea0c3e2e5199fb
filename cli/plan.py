"""``lowrank-ft plan``: what a conversion would change, or what a training from scratch costs."""

import argparse

from lowrank_ft_cli.arguments import add_calibration, add_device, add_dtype, add_model, add_size, count
from lowrank_ft_cli.asked import check_models

HELP = "show the ranks and sizes of a conversion; reads headers, not weights"
_TRAINS = ("method", "refine_epochs", "distill_epochs", "activations_dir")  # a plan trains nothing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, or_preset=True)
    add_size(parser)
    add_calibration(parser, leave_out=_TRAINS)
    add_dtype(parser)
    add_device(parser)
    cost = parser.add_argument_group("cost of a training from scratch")
    cost.add_argument(
        "--tokens", type=count, metavar="N",
        help="also show the FLOPs of training on N tokens, such as 2.2B or 300M (a preset has its own number)",
    )  # fmt: skip
    cost.add_argument(
        "--sequence-length", type=count, metavar="N",
        help="context length for the FLOPs (default: 1024, or the limit of the model)",
    )  # fmt: skip
    cost.add_argument(
        "--set", nargs="+", action="extend", metavar="NAME=VALUE",
        help="change values of a preset: hidden_size=512 num_hidden_layers=8 vocab_size=4096 ...",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the plan as JSON; convert --plan reads it back")
    parser.add_argument(
        "--picture", metavar="FILE", help="plot the ranks into a .png, .svg or .pdf file (needs lowrank-ft[plot])"
    )
    memory = parser.add_argument_group("memory of training, and the options of that training")
    memory.add_argument("--memory", action="store_true", help="estimate the peak memory of a training step")
    memory.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="sequences per forward pass (default: 8)"
    )
    memory.add_argument(
        "--block-size", type=int, metavar="N", help="tokens per sequence (default: 1024, or the limit of the model)"
    )
    memory.add_argument(
        "--gradient-accumulation-steps", type=int, default=1, metavar="N", help="forward passes per step (default: 1)"
    )
    memory.add_argument(
        "--gradient-checkpointing", action="store_true", help="activations are recomputed in the backward pass"
    )
    memory.add_argument(
        "--mixed-precision", choices=("no", "bf16", "fp16"), default="no",
        help="dtype of the arithmetic (default: no); the weights are in --dtype, here float32 by default",
    )  # fmt: skip
    memory.add_argument("--optim", default="adamw_torch", metavar="NAME", help="form of AdamW (default: adamw_torch)")


def run(options: argparse.Namespace) -> None:
    if options.preset is None:
        check_models(options.model)

        from lowrank_ft_cli.run_plan import show_plan

        show_plan(options)
    else:
        from lowrank_ft_cli.preset import show_preset

        show_preset(options, _changed(options))


def _changed(options: argparse.Namespace) -> list[str]:
    """Names of the options that do not have their default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args(["--preset", options.preset]))
    return [name for name, default in defaults.items() if getattr(options, name) != default]
