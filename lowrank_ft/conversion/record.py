"""What a conversion did and what it lost: ``conversion.json``, written by ``convert`` and read by ``lowrank-ft report``.

It is one object::

    {"format_version": 1, "command": "lowrank-ft convert ...", "base_model": "name", "method": "anchored",
     "allocation": "loss", "refine_epochs": 10, "distill_epochs": 5, "seconds": 123.4,
     "processes": 1,
     "calibration": {"source": "calibration.txt", "tokens": 65536} or null,
     "plan": Plan.to_dict(),
     "linears": {"model.layers.0.mlp.down_proj": {"spectrum": [9.1, 4.2], "spectrum_index": [1, 2],
                                                  "weight_error": 0.31, "output_error": 0.12 or null}},
     "blocks": [{"name": "model.layers.0", "error_before": 0.2, "error_after": 0.1}],
     "distillation": {"before": 0.9, "after": 0.2} or null}
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.checkpoints.format import CONVERSION_FILE
from lowrank_ft.conversion.calibration import Calibration, default_method
from lowrank_ft.conversion.processes import Processes
from lowrank_ft.errors import CheckpointError
from lowrank_ft.factorization.plan import Plan
from lowrank_ft.factorization.solvers import gram_singular_values
from lowrank_ft.nn.forms import layer_factors

CONVERSION_VERSION = 1

_MOST_VALUES = 256


@dataclass(frozen=True)
class LinearRecord:
    """One factorized linear, before end-to-end distillation; what was not measured is empty or None.

    Attributes:
        spectrum: singular values of the dense weight, descending, evenly thinned to 256.
        spectrum_index: their places, from 1.
        weight_error: ``|W - UV| / |W|``.
        output_error: the same after multiplication with the calibration inputs.
    """

    spectrum: tuple[float, ...] = ()
    spectrum_index: tuple[int, ...] = ()
    weight_error: float | None = None
    output_error: float | None = None

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "LinearRecord":
        spectrum = tuple(float(s) for s in entry.get("spectrum") or ())
        index = tuple(int(i) for i in entry.get("spectrum_index") or range(1, len(spectrum) + 1))
        if len(index) != len(spectrum):
            raise ValueError(f"a spectrum of {len(spectrum)} values with {len(index)} places")
        return cls(spectrum, index, _number(entry.get("weight_error")), _number(entry.get("output_error")))


@dataclass(frozen=True)
class BlockRecord:
    """Relative error of the hidden states of one block, before and after its refinement."""

    name: str
    error_before: float | None
    error_after: float | None

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "BlockRecord":
        return cls(str(entry["name"]), _number(entry.get("error_before")), _number(entry.get("error_after")))


@dataclass
class ConversionRecord:
    """Filled by :func:`lowrank_ft.convert`, or read by :func:`read_conversion`.

    Attributes:
        linears: by the name of the factored linear.
        blocks: those that were converted one after the other.
        command, base_model, calibration, plan: what was done to which model, as far as that is known.
        facts: the plain entries of the file (method, seconds, ...) as they are.
        distillation: its loss on held-out text ``before`` and ``after``: KL to the dense model, in nats per token, for
            models that predict tokens.
    """

    linears: dict[str, LinearRecord] = field(default_factory=dict)
    blocks: list[BlockRecord] = field(default_factory=list)
    command: str | None = None
    base_model: str | None = None
    calibration: Mapping[str, Any] | None = None
    plan: Plan | None = None
    facts: dict[str, str | float] = field(default_factory=dict)
    distillation: Mapping[str, float] | None = None

    def to_dict(
        self,
        plan: Plan,
        *,
        command: str,
        base_model: str,
        method: str | None,
        allocation: str | None,
        calibration: Calibration | None,
        seconds: float,
        processes: int = 1,
    ) -> dict[str, Any]:
        """What ``conversion.json`` holds of a conversion that has just been done."""
        return {
            "format_version": CONVERSION_VERSION,
            "command": command,
            "base_model": base_model,
            "method": method or default_method(calibration),
            "allocation": allocation or "uniform",
            "refine_epochs": calibration.refine_epochs if calibration else 0,
            "distill_epochs": calibration.distill_epochs if calibration else 0,
            "calibration": {"source": calibration.source, "tokens": calibration.tokens} if calibration else None,
            "seconds": round(seconds, 1),
            "processes": processes,
            "distillation": dict(self.distillation) if self.distillation else None,
            "plan": plan.to_dict(),
            "linears": {name: asdict(entry) for name, entry in self.linears.items()},
            "blocks": [asdict(entry) for entry in self.blocks],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ConversionRecord":
        """The inverse of :meth:`to_dict`; entries may be missing.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, OverflowError: an entry is something else than documented.
        """
        plain = ("method", "allocation", "refine_epochs", "distill_epochs", "seconds", "processes")
        linears = _read(data, "linears", dict) or {}
        return cls(
            linears={name: _read(linears, name, LinearRecord.from_dict) for name in linears},
            blocks=_read(data, "blocks", lambda blocks: [BlockRecord.from_dict(b) for b in blocks]) or [],
            command=_text(data.get("command")),
            base_model=_text(data.get("base_model")),
            calibration=_read(data, "calibration", dict) if data.get("calibration") else None,
            plan=_read(data, "plan", Plan.from_dict) if data.get("plan") else None,
            distillation=_read(data, "distillation", lambda d: {k: float(d[k]) for k in ("before", "after")}),
            facts={k: v for k in plain if isinstance(v := data.get(k), str | int | float) and not isinstance(v, bool)},
        )

    def gather(self, processes: Processes, order: Iterable[str]) -> None:
        """Take over what the other processes noted of their linears; those in ``order`` come first, in that order."""
        if processes.count == 1:
            return
        found = {n: e for linears in processes.collect(self.linears) for n, e in linears.items()}
        self.linears = {n: found[n] for n in [*(n for n in order if n in found), *found]}

    def add_block(self, name: str, before: float, after: float) -> None:
        self.blocks.append(BlockRecord(name, before, after))

    def add_distillation(self, before: float, after: float) -> None:
        self.distillation = {"before": before, "after": after}

    def add_linear(self, name: str, weight: Tensor, layer: nn.Module, inputs: Tensor | None) -> None:
        """Note what ``layer`` lost of ``weight (out, in)``, given moments ``inputs (in, in)`` or None."""
        values, places = thinned_spectrum(weight, name)
        rounded = tuple(float(f"{v:.6g}") for v in values)
        self.linears[name] = LinearRecord(rounded, tuple(places), *relative_errors(weight, layer, inputs))


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
        return ConversionRecord.from_dict(data)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:  # a PlanError is a ValueError
        raise CheckpointError(f"{path} is incomplete or damaged ({_short(error)}); delete it") from None


def thinned_spectrum(weight: Tensor, name: str) -> tuple[list[float], list[int]]:
    """Singular values of ``weight (out, in)``, descending, evenly thinned to 256, and their places, from 1."""
    values = gram_singular_values(weight, name)
    index = torch.linspace(0, len(values) - 1, min(_MOST_VALUES, len(values))).round().long()
    return values[index].tolist(), (index + 1).tolist()


@torch.no_grad()
def relative_errors(weight: Tensor, layer: Any, inputs: Tensor | None) -> tuple[float, float | None]:
    """``|W - UV| / |W|`` in the Frobenius norm, and ``|(W - UV) X| / |W X|`` from ``X X^T (in, in)``."""
    dense = weight.float()
    left, right = layer_factors(layer)
    lost = dense - left.float() @ right.float()
    weight_error = (lost.norm() / dense.norm().clamp_min(1e-30)).item()
    if inputs is None:
        return weight_error, None
    power = [(m.to(inputs) @ inputs * m.to(inputs)).sum().clamp_min(0) for m in (lost, dense)]
    return weight_error, (power[0] / power[1].clamp_min(1e-30)).sqrt().item()


def _read(data: Mapping[str, Any], name: str, make: Callable[[Any], Any]) -> Any:
    """One entry, or None; an error says which."""
    value = data.get(name)
    try:
        return None if value is None else make(value)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"in {name}, {_short(error)}") from None


def _number(value: Any) -> float | None:
    """None where nothing was measured; NaN, which JSON writers of Python let through, means the same."""
    return None if value is None or not math.isfinite(float(value)) else float(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
