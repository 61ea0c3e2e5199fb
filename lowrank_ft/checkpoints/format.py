"""The checkpoint format: what ``config.json`` says under ``quantization_config``.

``model_type`` and ``architectures`` stay the stock ones. The entry tells a loader which linears to swap, before any
weight is read::

    "quantization_config": {
        "quant_method": "lowrank",
        "format_version": 2,
        "ranks": {"model.layers.0.mlp.up_proj": 64, ...},
        "pivots": {"model.layers.0.mlp.up_proj": "input", ...},
        "base_model": "meta-llama/Llama-3.2-1B",
        "base_revision": "4e20de362430cd3b72f300e6b0f18e50e7166e08"
    }

Tensors are named ``<linear>.U.weight``, ``<linear>.V.weight``, ``<linear>.bias``, and ``<linear>.weight``, the
one-element tripwire of :class:`~lowrank_ft.nn.LowRankLinear`. Linears under ``pivots`` have the pivoted form of that
class, and ``<linear>.order``. Without any, the entry says version 1, which knew plain factors alone.

A stack of experts is named as the parameter of the dense model, such as ``model.layers.0.mlp.experts.down_proj``. Its tensors
are ``<experts>.factors.down_proj.U``, ``.V`` and, pivoted, ``.order``, and the tripwire ``<experts>.down_proj``
(:class:`~lowrank_ft.nn.FactoredExperts`). With stacks, the entry says version 3.

Under ``quantized`` is the entry of another library that packed the linears (:mod:`.second`). Then the version is 3, too.
"""

from pathlib import Path
from typing import Any

from torch import nn

from lowrank_ft.nn import UnfoldedExperts, factored_stacks, stored_form

CONVERSION_FILE = "conversion.json"
RANK_MAP_FILE = "rank_map.png"
PLACEHOLDER = "path/or/hub-id"
"""Stands in a model card for the address that only a push knows."""

QUANT_METHOD = "lowrank"
FORMAT_VERSION = 3
_WITHOUT_STACKS = 2
_WITHOUT_PIVOTS = 1


def quantization_config(
    ranks: dict[str, int],
    base_model: str | None = None,
    base_revision: str | None = None,
    pivots: dict[str, str] | None = None,
    stacked: bool = False,
) -> dict[str, Any]:
    """The entry for a model with these ranks; where its dense weights came from is told where that is known.

    Args:
        stacked: some are ranks of experts.
    """
    version = FORMAT_VERSION if stacked else _WITHOUT_STACKS if pivots else _WITHOUT_PIVOTS
    entry: dict[str, Any] = {"quant_method": QUANT_METHOD, "format_version": version, "ranks": dict(ranks)}
    if pivots:
        entry["pivots"] = dict(pivots)
    origin = {"base_model": base_model, "base_revision": base_revision}
    return entry | {k: v for k, v in origin.items() if v}


def describe_in_config(model: nn.Module, base_model: str | None = None) -> None:
    """Write the ranks into ``model.config``, so that a plain ``save_pretrained`` makes a checkpoint that loads.

    Where the dense weights came from is kept from an earlier entry; a dense model is its own origin.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    entry = getattr(config, "quantization_config", None)
    if entry is None:
        known, revision = getattr(config, "_name_or_path", None) or None, getattr(config, "_commit_hash", None)
    else:
        old = entry if isinstance(entry, dict) else entry.to_dict()
        known, revision = old.get("base_model"), old.get("base_revision")
    if base_model is not None and base_model != known:
        known, revision = base_model, None
    if known and Path(known).expanduser().is_dir():
        # As it was typed it could be read as a name on the Hub, or mean another folder elsewhere. It is not published.
        known = str(Path(known).expanduser().resolve())
    ranks, pivots = stored_form(model)
    stacked = any(True for _ in factored_stacks(model)) or any(isinstance(m, UnfoldedExperts) for m in model.modules())
    config.quantization_config = quantization_config(ranks, known, revision, pivots, stacked)
