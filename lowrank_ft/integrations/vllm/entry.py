"""What of a compact checkpoint vLLM cannot serve, told before a weight is read."""

from collections.abc import Mapping
from typing import Any

from lowrank_ft.checkpoints.format import FORMAT_VERSION
from lowrank_ft.errors import CheckpointError

_KNOWN = ("quant_method", "format_version", "ranks", "pivots", "base_model", "base_revision")
_TRANSPOSED = ("gpt2",)  # vLLM turns every tensor of these linears around as it reads them, factors, too


def check_entry(entry: Mapping[str, Any]) -> None:
    """Raise a CheckpointError unless this code serves what the ``quantization_config`` of a checkpoint says."""
    version = entry.get("format_version", 1)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"this checkpoint has lowrank format version {version}, and this code reads up to {FORMAT_VERSION}; "
            "run pip install --upgrade lowrank-ft"
        )
    for key in entry:
        if key not in _KNOWN:
            raise CheckpointError(
                f"quantization_config has {key!r}, which the vLLM plugin does not know; it serves factors that are not "
                "quantized: export them without, or upgrade lowrank-ft"
            )


def refuse_transposed(model_type: str | None, ranks: Mapping[str, int]) -> None:
    """Raise a CheckpointError for a factored model whose linears are stored ``(in, out)``."""
    if model_type in _TRANSPOSED and ranks:
        raise unserved(next(iter(ranks)), f"vLLM transposes the linears of {model_type} as it reads them")


def unserved(name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"vLLM cannot serve the factored {name}: {why}. Serve the dense checkpoint that lowrank-ft merge writes, or "
        "convert without this linear (--exclude-modules)"
    )
