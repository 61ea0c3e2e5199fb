"""What a conversion or a run leaves to look at: ``conversion.json``, and ``metrics.jsonl`` with a picture of it.

Readers only; whoever does the work writes. ``conversion.json`` is one object::

    {"format_version": 1, "command": "lowrank-ft convert ...", "base_model": "name", "method": "anchored",
     "allocation": "loss", "refine_epochs": 10, "distill_epochs": 5, "seconds": 123.4,
     "calibration": {"source": "calibration.txt", "tokens": 65536} or null,
     "plan": Plan.to_dict(),
     "linears": {"model.layers.0.mlp.down_proj": {"spectrum": [9.1, 4.2], "spectrum_index": [1, 2],
                                                  "weight_error": 0.31, "output_error": 0.12 or null}},
     "blocks": [{"name": "model.layers.0", "error_before": 0.2, "error_after": 0.1}]}

``spectrum`` holds singular values of the dense weight, descending, all or evenly thinned, and ``spectrum_index`` their
places, from 1. ``weight_error`` is ``|W - UV| / |W|``, ``output_error`` is ``|Y - Y'| / |Y|`` on calibration tokens.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_ft.checkpoints.format import CONVERSION_FILE
from lowrank_ft.conversion.record import CONVERSION_VERSION
from lowrank_ft.errors import CheckpointError
from lowrank_ft.factorization.plan import Plan


@dataclass(frozen=True)
class LinearRecord:
    """One factorized linear, as in ``conversion.json``; what was not measured is empty or None."""

    spectrum: tuple[float, ...] = ()
    spectrum_index: tuple[int, ...] = ()
    weight_error: float | None = None
    output_error: float | None = None


@dataclass(frozen=True)
class BlockRecord:
    """Relative output error of one block, before and after its refinement."""

    name: str
    error_before: float | None
    error_after: float | None


@dataclass(frozen=True)
class ConversionRecord:
    """``conversion.json``; ``facts`` holds its plain entries (method, seconds, ...) as they are."""

    command: str | None = None
    base_model: str | None = None
    calibration: Mapping[str, Any] | None = None
    plan: Plan | None = None
    linears: Mapping[str, LinearRecord] = field(default_factory=dict)
    blocks: tuple[BlockRecord, ...] = ()
    facts: Mapping[str, str | float] = field(default_factory=dict)


def read_conversion(folder: Path) -> ConversionRecord | None:
    """The record of the conversion, or None where the folder has none.

    Raises:
        CheckpointError: it is no valid JSON, of a newer version, or holds something else than documented above.
    """
    path = folder / CONVERSION_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no record of a conversion ({_short(error)}); delete it") from None
    if version != CONVERSION_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}, and this release reads {CONVERSION_VERSION}; update lowrank-ft"
        )
    try:
        return _conversion(data)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:  # a PlanError is a ValueError
        raise CheckpointError(f"{path} lacks or garbles something ({_short(error)}); delete it") from None


def _conversion(data: Mapping[str, Any]) -> ConversionRecord:
    plain = ("method", "allocation", "refine_epochs", "distill_epochs", "seconds")
    return ConversionRecord(
        command=_text(data.get("command")),
        base_model=_text(data.get("base_model")),
        calibration=_read(data, "calibration", dict) if data.get("calibration") else None,
        plan=_read(data, "plan", Plan.from_dict) if data.get("plan") else None,
        linears={name: _read(data["linears"], name, _linear) for name in _read(data, "linears", dict) or {}},
        blocks=_read(data, "blocks", lambda blocks: tuple(map(_block, blocks))) or (),
        facts={k: v for k in plain if isinstance(v := data.get(k), str | int | float) and not isinstance(v, bool)},
    )


def _read(data: Mapping[str, Any], name: str, make: Callable[[Any], Any]) -> Any:
    """One entry, or None; an error says which."""
    value = data.get(name)
    try:
        return None if value is None else make(value)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"in {name}, {_short(error)}") from None


def _block(entry: Mapping[str, Any]) -> BlockRecord:
    return BlockRecord(str(entry["name"]), _number(entry.get("error_before")), _number(entry.get("error_after")))


def _linear(entry: Mapping[str, Any]) -> LinearRecord:
    spectrum = tuple(float(s) for s in entry.get("spectrum") or ())
    index = tuple(int(i) for i in entry.get("spectrum_index") or range(1, len(spectrum) + 1))
    if len(index) != len(spectrum):
        raise ValueError(f"a spectrum of {len(spectrum)} values with {len(index)} places")
    return LinearRecord(spectrum, index, _number(entry.get("weight_error")), _number(entry.get("output_error")))


def _number(value: Any) -> float | None:
    """None where nothing was measured; NaN, which JSON writers of Python let through, means the same."""
    return None if value is None or not math.isfinite(float(value)) else float(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
