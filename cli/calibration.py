"""Turn the calibration flags of ``plan`` and ``convert`` into calibration data."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from lowrank_ft.checkpoints.source import Source
from lowrank_ft.conversion import METHODS, Calibration
from lowrank_ft.conversion.batches import CALIBRATION_TOKENS, OWN_TOKENS, SELF, own_batches, read_batches
from lowrank_ft.data.sources import read_rows
from lowrank_ft.errors import ConfigError, require_choice
from lowrank_ft.factorization.allocation import ALLOCATIONS

_TUNING = ("refine_epochs", "distill_epochs", "activations_dir")


def check_flags(options: argparse.Namespace) -> None:
    """Raise a ConfigError for flags that are unknown, out of range, or contradict each other."""
    if options.method is not None:
        require_choice("--method", options.method, METHODS)
    if options.allocation is not None:
        require_choice("--allocation", options.allocation, ALLOCATIONS)
    for flag in ("refine_epochs", "distill_epochs"):
        if not 0 <= (getattr(options, flag) or 0) < math.inf:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(options, flag)}; it must be 0 or more")
    if options.activations_dir is not None and not Path(options.activations_dir).is_dir():
        raise ConfigError(f"--activations-dir {options.activations_dir} is no folder; make it first")


def is_wanted(options: argparse.Namespace, writes_text: bool) -> bool:
    """Whether calibration data are needed, by what was asked for or by default.

    Args:
        writes_text: the model can write text to be calibrated on, so that calibration is the default.
    """
    asked = [f for f in ("calibration_data", *_TUNING) if getattr(options, f)]  # 0 epochs ask for none
    if options.allocation in ("energy", "loss") or asked:
        return True
    if options.method is not None:
        return bool(options.method != "svd")
    return writes_text


def read_calibration(options: argparse.Namespace, source: Source, model: Any) -> Calibration:
    """The calibration data that the flags name, or text of the model's own.

    Raises:
        DataError: they are missing, too short, or not this model's.
    """
    name = options.calibration_data or SELF
    length, seed = options.calibration_block_size, options.seed
    if name == SELF:
        tokens = OWN_TOKENS if options.calibration_tokens is None else options.calibration_tokens
        if options.calibration_data is None:
            print(f"calibration: the model writes {tokens:,} tokens of text itself; --calibration-data FILE is faster "
                  "and better, --method svd does without", file=sys.stderr)  # fmt: skip
        batches = own_batches(model, tokens, length, seed, progress=True)
    else:
        tokens = CALIBRATION_TOKENS if options.calibration_tokens is None else options.calibration_tokens
        rows = read_rows(name, options.calibration_split, options.calibration_config)
        batches = read_batches(
            model, rows, name, source.load_preprocessor(model), tokens, length, options.calibration_column, seed
        )
    settings = {f: v for f in ("refine_epochs", "distill_epochs") if (v := getattr(options, f, None)) is not None}
    directory = getattr(options, "activations_dir", None)  # plan trains nothing and has none of these
    folder = None if directory is None else Path(directory)
    shown = Path(name).name if Path(name).is_absolute() else name
    calibration = Calibration(batches, shown, activations_dir=folder, seed=seed, **settings)
    print(f"calibration: {calibration.tokens:,} tokens of {shown}", file=sys.stderr)
    return calibration
