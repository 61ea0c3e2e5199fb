"""``lowrank-ft pretrain``: start ``recipes/pretrain.py`` under ``accelerate launch``."""

import argparse

from lowrank_ft_cli.launch import add_usage, launch_recipe

HELP = "train from scratch with low rank, guided at first; starts accelerate launch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_usage(parser, "pretrain")


def run(options: argparse.Namespace) -> int:
    return launch_recipe("pretrain", options.passed_on)
