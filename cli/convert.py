"""``lowrank-ft convert``: a dense checkpoint in, a compact one out."""

import argparse

from lowrank_ft_cli.arguments import (
    add_calibration,
    add_device,
    add_dtype,
    add_hub,
    add_model,
    add_output,
    add_size,
)

HELP = "factorize a dense checkpoint into a compact one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_size(parser)
    parser.add_argument("--plan", metavar="FILE", help="ranks from a file that plan --json wrote, edited or not")
    parser.add_argument(
        "--method", metavar="NAME",
        help="svd (the weight alone), activation, or anchored (default; svd for models that cannot write text, "
        "unless --calibration-data is given)",
    )  # fmt: skip
    parser.add_argument(
        "--refine-epochs", type=int, metavar="N",
        help="passes that train each block to match its dense twin (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--distill-epochs", type=float, metavar="N",
        help="passes that train all factors to match the dense model's output (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--activations-dir", metavar="DIR", help="keep hidden states in files there, where memory does not hold them"
    )
    add_calibration(parser)
    add_output(parser, "lowrank")
    add_dtype(parser)
    add_device(parser)
    add_hub(parser)


def run(options: argparse.Namespace) -> None:
    from lowrank_ft_cli.run_convert import convert_checkpoint

    convert_checkpoint(options)
