"""``lowrank-ft report``: one HTML page about a compact checkpoint."""

import argparse

from lowrank_ft_cli.arguments import add_device, add_text

HELP = "write one HTML page about a compact checkpoint: size, ranks, errors, training, evaluation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder that convert, finetune or export wrote")
    parser.add_argument("--output", metavar="FILE", help="file to write (default: report.html in that folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file that --output names")
    parser.add_argument(
        "--baseline", metavar="MODEL", help="the dense model (default: the base model, if that is a local folder)"
    )
    add_text(parser, "evaluate both models on this text, jsonl or parquet file, or dataset on the Hub")
    parser.add_argument("--eval", metavar="FILE", help="take the numbers from a file that eval --json wrote")
    parser.add_argument("--update-card", action="store_true", help="also write the numbers into the table of README.md")
    add_device(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code in the checkpoint")


def run(options: argparse.Namespace) -> None:
    from lowrank_ft_cli.run_report import write_report

    write_report(options)
