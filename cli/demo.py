"""``lowrank-ft demo``: the whole path on the embedded model."""

import argparse
from pathlib import Path

from lowrank_ft.demo.demo import run_demo


def run(options: argparse.Namespace) -> None:
    run_demo(Path(options.output_dir), options.param_ratio, options.max_steps)
