"""Read the calibration data of ``plan`` and ``convert``."""

import sys
from pathlib import Path
from typing import Any

from lowrank_ft.checkpoints.source import Source
from lowrank_ft.conversion import Calibration
from lowrank_ft.conversion.batches import CALIBRATION_TOKENS, OWN_TOKENS, SELF, own_batches, read_batches
from lowrank_ft.conversion.options import CalibrationOptions
from lowrank_ft.data.sources import read_rows
from lowrank_ft.errors import CheckpointError


def read_calibration(options: CalibrationOptions, source: Source, model: Any) -> Calibration:
    """The calibration data that the options name, or text of the model's own.

    Raises:
        DataError: they are missing, too short, or not this model's.
    """
    name = options.calibration_data or SELF
    length, seed = options.calibration_block_size, options.seed
    if name == SELF:
        tokens = OWN_TOKENS if options.calibration_tokens is None else options.calibration_tokens
        if options.calibration_data is None:
            print(f"calibration: the model writes {tokens:,} tokens of text; --calibration-data FILE is faster and "
                  "gives a better model, --method svd needs no text", file=sys.stderr)  # fmt: skip
        batches = own_batches(model, tokens, length, seed, progress=True, preprocessor=_tokenizer(source))
    else:
        tokens = CALIBRATION_TOKENS if options.calibration_tokens is None else options.calibration_tokens
        rows = read_rows(name, options.calibration_split, options.calibration_config)
        batches = read_batches(
            model, rows, name, source.load_preprocessor(model), tokens, length, options.calibration_column, seed
        )
    settings = {f: v for f in ("refine_epochs", "distill_epochs") if (v := getattr(options, f)) is not None}
    folder = None if options.activations_dir is None else Path(options.activations_dir)
    shown = Path(name).name if Path(name).is_absolute() else name
    calibration = Calibration(batches, shown, activations_dir=folder, seed=seed, **settings)
    print(f"calibration: {calibration.tokens:,} tokens of {shown}", file=sys.stderr)
    return calibration


def _tokenizer(source: Source) -> Any:
    """None where the folder has none: a model writes text without, and only its chats need it."""
    try:
        return source.load_tokenizer()
    except CheckpointError:
        return None
