"""The checkpoint format: what ``config.json`` says under ``quantization_config``.

``model_type`` and ``architectures`` stay the stock ones. The entry tells a loader which linears to swap, before any
weight is read::

    "quantization_config": {
        "quant_method": "lowrank",
        "format_version": 1,
        "ranks": {"model.layers.0.mlp.up_proj": 64, ...},
        "base_model": "meta-llama/Llama-3.2-1B",
        "base_revision": "4e20de362430cd3b72f300e6b0f18e50e7166e08"
    }

Tensors are named ``<linear>.U.weight``, ``<linear>.V.weight``, ``<linear>.bias``, and ``<linear>.weight``, the
one-element tripwire of :class:`~lowrank_ft.nn.LowRankLinear`.
"""

from typing import Any

QUANT_METHOD = "lowrank"
FORMAT_VERSION = 1


def quantization_config(
    ranks: dict[str, int], base_model: str | None = None, base_revision: str | None = None
) -> dict[str, Any]:
    """The entry for a model with these ranks; where its dense weights came from is told where that is known."""
    entry: dict[str, Any] = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "ranks": dict(ranks)}
    origin = {"base_model": base_model, "base_revision": base_revision}
    return entry | {k: v for k, v in origin.items() if v}
