"""``lowrank-ft demo``: the whole path on the embedded model."""

import argparse
from pathlib import Path

HELP = "run all steps on a small model that ships with the package; no network is needed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", default="lowrank-ft-demo", help="output folder (default: lowrank-ft-demo)")
    parser.add_argument(
        "--param-ratio", type=float, default=0.6, help="share of the linears' parameters to keep (default: 0.6)"
    )
    parser.add_argument("--max-steps", type=int, default=120, help="optimizer steps of each training (default: 120)")


def run(options: argparse.Namespace) -> None:
    from lowrank_ft.demo.demo import run_demo

    run_demo(Path(options.output_dir), options.param_ratio, options.max_steps)
