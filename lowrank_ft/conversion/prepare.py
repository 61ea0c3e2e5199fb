"""From the options of a conversion to its calibration: text that is given, text that the model writes, what is held out.

Narrow text ruins a model on everything else. So a part of the text is written by the model itself, which says what it
was trained on; and a part of both is held out, by which refinement and distillation are judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ft.checkpoints.architecture import writes_text
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.conversion.batches import (
    LEAST_TOKENS,
    calibration_length,
    own_batches,
    read_batches,
    to_batches,
)
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.chains import Batch
from lowrank_ft.conversion.effort import EFFORTS, ENCODER_TOKENS
from lowrank_ft.conversion.options import SELF, CalibrationOptions
from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.conversion.sampling import generates
from lowrank_ft.data.sources import read_rows
from lowrank_ft.errors import CheckpointError, ConfigError

_HELD_OUT_ROWS = 2
_LEAST_ROWS = 16  # of fewer, none is spared
_LEAST_BATCHES = 8
_HELD_OUT_BATCHES = 4


@dataclass(frozen=True)
class Prepared:
    """Calibration data that are read, but for what the model has yet to write.

    Attributes:
        given: batches of each of the data that were named; none where the model writes all.
        own_tokens: tokens for the model to write.
        length: tokens per sequence.
        settings: further arguments of :class:`Calibration`.
        tokenizer: the model's, for chats of its own; None where it has none.
    """

    given: list[list[Batch]]
    own_tokens: int
    length: int | None
    settings: dict[str, Any]
    tokenizer: Any = None

    def sample(self, model: Any) -> Batch:
        """A batch like those to come, for measurements."""
        if self.given:
            return self.given[0][0]
        size = model.config.get_text_config().vocab_size
        length = calibration_length(model, self.length)
        return {"input_ids": torch.arange(length)[None] % size}

    def outline(self) -> Calibration:
        """What the calibration will be like; the model's own text is missing."""
        sequence = {"input_ids": torch.zeros(1, max(1, self.own_tokens), dtype=torch.long)}
        given = [batch for part in self.given for batch in part]
        return Calibration([*given, *([sequence] if self.own_tokens else [])], **self.settings)

    def calibration(self, model: Any, progress: bool = False, processes: Processes = ONE) -> Calibration:
        """Let the model write its part, mix all parts, and hold some of each out.

        Args:
            processes: who shares the work. Batches have a row for each of them.

        Raises:
            DataError: see :func:`own_batches`.
        """
        seed = self.settings["seed"]
        own = []
        if self.own_tokens:
            own = own_batches(model, self.own_tokens, self.length, seed, progress, self.tokenizer, processes)
        parts = [_hold_out(part, processes.count) for part in (*self.given, own) if part]
        batches = [b for fitted, _ in parts for b in fitted]
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = [b for _, held in parts for b in held]
        return Calibration([batches[i] for i in order], held_out=held_out, processes=processes, **self.settings)


def prepare(options: CalibrationOptions, source: Source, model: Any) -> Prepared:
    """Read the data that the options name. Several of them have equal shares of the tokens.

    Raises:
        DataError: they are missing, too short, or not this model's.
    """
    effort = EFFORTS[options.effort]
    names = options.sources
    distill = effort.distill_epochs if options.distill_epochs is None else options.distill_epochs
    tokens = options.calibration_tokens
    if tokens is None:
        tokens = effort.tokens * (ENCODER_TOKENS if distill and _encodes_text(model) else 1)
    length = options.calibration_block_size
    share = effort.own_share if options.own_share is None else options.own_share
    own = tokens if names == [SELF] else round(share * tokens) if writes_text(model.config) else 0
    own = 0 if own < max(LEAST_TOKENS, calibration_length(model, length)) and names != [SELF] else own
    given: list[list[Batch]] = []
    if names != [SELF]:
        preprocessor = source.load_preprocessor(model)
        column, seed, each = options.calibration_column, options.seed, (tokens - own) // len(names)
        for name in names:
            rows = read_rows(name, options.calibration_split, options.calibration_config)
            given.append(read_batches(model, rows, name, preprocessor, each, length, column, seed))
    refine = effort.refine_epochs if options.refine_epochs is None else options.refine_epochs
    settings = {
        "source": ", ".join(Path(name).name if Path(name).is_absolute() else name for name in names),
        "method": options.method or effort.method,
        "fit_tokens": effort.fit_tokens,
        "refine_epochs": refine,
        "distill_epochs": distill,
        "activations_dir": None if options.activations_dir is None else Path(options.activations_dir),
        "seed": options.seed,
    }
    return Prepared(given, own, length, settings, _tokenizer(source) if own else None)


def load_calibration(
    model: Any, data: str | list[str] = SELF, *, effort: str = "default", progress: bool = False, **options: Any
) -> Calibration:
    """What ``lowrank-ft convert --calibration-data DATA`` fits a model to, for :func:`lowrank_ft.convert`.

    Args:
        model: a causal language model, encoder or image model of transformers, which has not been converted. Its
            tokenizer or image processor is read from where it came from.
        data: a text, jsonl or parquet file, a dataset on the Hub, or ``self``: text that the model writes. A list of
            files and datasets shares the tokens equally.
        effort: one of ``EFFORTS``.
        progress: show progress bars on stderr.
        options: further fields of :class:`CalibrationOptions`, such as ``calibration_tokens`` and ``own_share``.

    Raises:
        ConfigError: an option is out of range, or belongs to :func:`lowrank_ft.convert`.
        DataError: the data are missing, too short, or not this model's.
        CheckpointNotFoundError, CheckpointError: the model's folder or repository is gone, or has no tokenizer.
    """
    if "allocation" in options:
        raise ConfigError("allocation says how convert distributes ranks; give it to convert, not to load_calibration")
    wanted = CalibrationOptions(effort=effort, calibration_data=data, **options)
    source = Source(model.config._name_or_path, getattr(model.config, "_commit_hash", None))
    return prepare(wanted, source, model).calibration(model, progress)


def _encodes_text(model: Any) -> bool:
    return model.main_input_name == "input_ids" and not generates(model)


def _hold_out(batches: list[Batch], least: int = 1) -> tuple[list[Batch], list[Batch]]:
    """Packed sequences: two of them, or ``least``; else four batches, of few one. Nothing where little is there.

    Args:
        least: rows of a batch, where packed sequences allow it.
    """
    if all(set(b) == {"input_ids"} for b in batches):
        rows: Sequence[Tensor] = [r for b in batches for r in b["input_ids"]]
        if len({len(r) for r in rows}) > 1:
            return batches, []
        packed, held = torch.stack(list(rows)), max(_HELD_OUT_ROWS, least)
        if len(rows) < max(_LEAST_ROWS, 2 * held):
            return batches if least == 1 else to_batches(packed, least), []
        return to_batches(packed[:-held], least), to_batches(packed[-held:], least)
    if len(batches) < _LEAST_BATCHES:
        return batches, []
    spared = min(_HELD_OUT_BATCHES, len(batches) // _LEAST_BATCHES)
    return batches[:-spared], batches[-spared:]


def _tokenizer(source: Source) -> Any:
    """None where the folder has none: a model writes text without, and only its chats need it."""
    try:
        return source.load_tokenizer()
    except CheckpointError:
        return None
