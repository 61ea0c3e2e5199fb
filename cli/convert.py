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
from lowrank_ft_cli.asked import check_models, choose_output_dir

HELP = "factorize a dense checkpoint into a compact one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "in several processes: lowrank-ft convert MODEL ... -- --num_processes 8 (what follows the two dashes goes to "
        "accelerate launch)"
    )
    add_model(parser)
    add_size(parser)
    parser.add_argument("--plan", metavar="FILE", help="take the ranks from a file that plan --json wrote")
    promise = parser.add_mutually_exclusive_group()
    promise.add_argument(
        "--max-loss", metavar="X",
        help="instead of a size: the smallest model whose perplexity on held-out calibration text rises by at most this, "
        "such as 5%%",
    )  # fmt: skip
    promise.add_argument(
        "--max-kl", metavar="X", type=float,
        help="the same for the KL divergence from the dense model, in nats per token, such as 0.1",
    )  # fmt: skip
    add_calibration(parser)
    parser.add_argument(
        "--stream", action="store_true",
        help="read, convert and write one block after the other, each into a file of its own, for models that are larger than "
        "memory; after an interruption the same command resumes after the last finished block",
    )  # fmt: skip
    add_output(parser, "lowrank")
    add_dtype(parser)
    add_device(parser)
    add_hub(parser)


def run(options: argparse.Namespace) -> None:
    check_models(options.model)
    choose_output_dir(options, options.model)

    from lowrank_ft_cli.run_convert import convert_checkpoint

    convert_checkpoint(options)
