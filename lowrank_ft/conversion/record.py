"""What a conversion did and what it lost, to be read by people and by ``lowrank-ft report``."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.conversion.calibration import Calibration, default_method
from lowrank_ft.factorization.plan import Plan
from lowrank_ft.factorization.solvers import gram_singular_values
from lowrank_ft.nn.forms import layer_factors

CONVERSION_VERSION = 1


_MOST_VALUES = 256


@dataclass
class ConversionRecord:
    """Filled by :func:`lowrank_ft.convert`.

    Attributes:
        linears: per factored linear, ``spectrum`` (singular values of the dense weight, thinned to 256, with their
            one-based ``spectrum_index``), ``weight_error = |W - UV| / |W|`` and ``output_error``, the same after
            multiplication with the calibration inputs; both before end-to-end distillation.
        blocks: per block, the relative error of its hidden states before and after refinement.
    """

    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)

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
    ) -> dict[str, Any]:
        """What ``conversion.json`` holds; the format is in docs/reference/checkpoint-format.md."""
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
            "plan": plan.to_dict(),
            "linears": self.linears,
            "blocks": self.blocks,
        }

    def add_block(self, name: str, before: float, after: float) -> None:
        self.blocks.append({"name": name, "error_before": before, "error_after": after})

    def add_linear(self, name: str, weight: Tensor, layer: nn.Module, inputs: Tensor | None) -> None:
        """Note what ``layer`` lost of ``weight (out, in)``, given moments ``inputs (in, in)`` or None."""
        values, places = thinned_spectrum(weight, name)
        weight_error, output_error = relative_errors(weight, layer, inputs)
        self.linears[name] = {
            "spectrum": [float(f"{v:.6g}") for v in values],
            "spectrum_index": places,
            "weight_error": weight_error,
            "output_error": output_error,
        }


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
