"""``lowrank-ft finetune``: start ``recipes/finetune.py`` under ``accelerate launch``."""

import argparse

from lowrank_ft_cli.launch import add_usage, launch_recipe

HELP = "fine-tune while the dense weight is phased out; starts accelerate launch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_usage(parser, "finetune")


def run(options: argparse.Namespace) -> int:
    return launch_recipe("finetune", options.passed_on)
