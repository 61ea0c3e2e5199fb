"""A compact checkpoint, read for what there is to say about it: counts, records, and on request its weights' spectra."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowrank_ft.checkpoints.architecture import check_headers, is_compact, skeleton
from lowrank_ft.checkpoints.models import load_model
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.console import progress_bar
from lowrank_ft.conversion.experts import fold_records
from lowrank_ft.conversion.record import (
    ConversionRecord,
    LinearRecord,
    read_conversion,
    relative_errors,
    thinned_spectrum,
)
from lowrank_ft.costs.flops import Comparison, compare
from lowrank_ft.errors import CheckpointError, CheckpointNotFoundError, LowRankError
from lowrank_ft.factorization.plan import LinearPlan
from lowrank_ft.factorization.ranks import resolve_rank
from lowrank_ft.factorization.targets import find_linears
from lowrank_ft.nn import (
    FactoredExperts,
    LowRankLinear,
    StackedFactors,
    factored_stacks,
    lowrank_layers,
    unfold_experts,
)
from lowrank_ft.nn.replace import dense_weight


@dataclass(frozen=True)
class Checkpoint:
    """What a report is about.

    Attributes:
        source: the local folder.
        comparison: counted from its config, on the meta device.
        base_model, revision: where the dense weights came from, as far as that is known.
        conversion: its ``conversion.json``, or None.
    """

    source: Source
    comparison: Comparison
    base_model: str | None
    revision: str | None
    conversion: ConversionRecord | None

    @property
    def folder(self) -> Path:
        assert self.source.folder is not None
        return self.source.folder

    @property
    def linears(self) -> tuple[LinearPlan, ...]:
        """The factored linears and those that stay dense; the plan of the conversion knows more of the latter."""
        known = {p.name for p in self.comparison.linears}
        plan = self.conversion.plan if self.conversion else None
        dense = [p for p in plan.linears if p.rank is None and p.name not in known] if plan else []
        return (*self.comparison.linears, *dense)


def open_checkpoint(source: Source) -> Checkpoint:
    """Read config, headers and records of a folder that ``convert`` or ``finetune`` wrote; no weights.

    Raises:
        CheckpointNotFoundError: it is no folder, or has no config.
        CheckpointError: it is no compact checkpoint, or damaged.
    """
    if source.folder is None:
        raise CheckpointNotFoundError(f"{source.name} is not a folder; report on what convert or finetune wrote")
    config = source.load_config()
    if not is_compact(config):
        raise CheckpointError(f"{source.name} is not a compact checkpoint; report on what convert or finetune wrote")
    tensors = source.tensors()
    entry = config.quantization_config
    entry = entry if isinstance(entry, Mapping) else entry.to_dict()
    model = skeleton(config, source.name, source.trust_remote_code)
    _factorize_skeleton(model, entry.get("ranks"), entry.get("pivots") or {}, f"{source.name}/config.json")
    check_headers(model, tensors, source.name)
    base_model, revision = entry.get("base_model"), entry.get("base_revision")
    conversion = read_conversion(source.folder)
    if not base_model and conversion is not None:
        base_model = conversion.base_model
    return Checkpoint(source, compare(model), base_model, revision, conversion)


def _factorize_skeleton(model: Any, ranks: Any, pivots: Any, where: str) -> None:
    targets = {s.name: s for s in find_linears(model)}
    if not isinstance(ranks, Mapping):
        raise CheckpointError(f"{where} lists no ranks; convert the model again")
    if not isinstance(pivots, Mapping):
        raise CheckpointError(f"{where} has pivots that are no object; convert the model again")
    stacks: dict[str, dict[str, tuple[int, str | None]]] = {}
    for name, rank in ranks.items():
        found = _name_here(name, model, targets)
        if found is None:
            raise CheckpointError(f"{where} gives a rank to {name}, which {type(model).__name__} does not have")
        if not isinstance(rank, int):
            raise CheckpointError(f"{where} gives {name} rank {rank!r}, which is no whole number")
        resolve_rank(rank, targets[found].shape, name)
        side = pivots.get(name)
        owner, _, leaf = found.rpartition(".")
        try:
            if targets[found].experts:
                stacks.setdefault(owner, {})[leaf] = (rank, side)
                StackedFactors(1, *targets[found].shape, rank, side, "meta")  # refuses what does not fit
            else:
                model.set_submodule(
                    found, LowRankLinear.like(model.get_submodule(found), rank, device="meta", pivot=side)
                )
        except ValueError as error:
            raise CheckpointError(f"{where}: {name}: {error}") from None
    for owner, parts in stacks.items():
        chosen, sides = {n: rank for n, (rank, _) in parts.items()}, {n: side for n, (_, side) in parts.items()}
        model.set_submodule(owner, FactoredExperts.like(model.get_submodule(owner), chosen, sides, device="meta"))


def _name_here(name: str, model: Any, targets: Mapping[str, Any]) -> str | None:
    """A bare model and one with a head differ by a prefix."""
    prefix = getattr(model, "base_model_prefix", "")
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((c for c in candidates if c in targets), None)


def dense_folder(checkpoint: Checkpoint, baseline: str | None) -> str | None:
    """The dense model to compare with: the named one, or the origin if that is a folder here."""
    if baseline is not None:
        return baseline
    base = checkpoint.base_model
    return base if base and os.path.isfile(os.path.join(os.path.expanduser(base), "config.json")) else None


def linear_records(
    checkpoint: Checkpoint, baseline: str | None, device: str
) -> tuple[dict[str, LinearRecord], str, str]:
    """Records of the linears; when the weights' error was measured; why spectra are missing, if they are.

    Args:
        baseline: folder or name of the dense model; its weights are read where no record has spectra.
        device: where singular values are computed.

    Raises:
        LowRankError: ``baseline`` was named and does not fit.
    """
    conversion = checkpoint.conversion
    recorded = dict(conversion.linears) if conversion else {}
    known = {p.name for p in checkpoint.linears}
    recorded = {name: r for name, r in recorded.items() if name in known}
    dense = dense_folder(checkpoint, baseline)
    if any(r.spectrum for r in recorded.values()) or dense is None:
        return recorded, "when the model was converted", "name the dense model with --baseline MODEL"
    # A checkpoint may name any folder as its origin; code there runs only if the user named it.
    trusted = checkpoint.source.trust_remote_code and baseline is not None
    try:
        measured = measure_linears(checkpoint, Source(dense, trust_remote_code=trusted), device)
    except LowRankError as error:
        if baseline is not None:
            raise
        print(f"note: {error}", file=sys.stderr)  # it may tell a path, and the report may be published
        title = Source(dense).title
        return recorded, "", f"{title} does not load or does not fit; name the dense model with --baseline MODEL"
    measured = {
        n: replace(r, output_error=recorded[n].output_error) if n in recorded else r for n, r in measured.items()
    }
    return measured, "of this checkpoint's factors", ""


def measure_linears(checkpoint: Checkpoint, dense: Source, device: str = "cpu") -> dict[str, LinearRecord]:
    """Spectra of the dense weights, and how far the factors are from them, by reading both models.

    Raises:
        CheckpointNotFoundError, CheckpointError: the dense model does not load, or has other linears.
    """
    compact = load_model(checkpoint.source)
    original = load_model(dense)
    stacks = {name: stack.experts for name, stack in factored_stacks(compact)}
    unfold_experts(compact)
    unfold_experts(original, [s.name for s in find_linears(original) if s.experts])
    targets = {s.name: s for s in find_linears(original)}
    records = {}
    bar = progress_bar(list(lowrank_layers(compact)), desc="spectra", unit="linear")
    for name, layer in bar:
        found = _name_here(name, original, targets)
        weight = dense_weight(original.get_submodule(found)) if found is not None else None
        if weight is None or tuple(weight.shape) != (layer.out_features, layer.in_features):
            shape = "no such linear" if weight is None else f"shape {tuple(weight.shape)}"
            raise CheckpointError(
                f"{dense.name} has {shape} at {name}, which is {(layer.out_features, layer.in_features)} in "
                f"{checkpoint.source.name}; name the dense model that it came from with --baseline"
            )
        weight = weight.to(device)
        values, places = thinned_spectrum(weight, f"{name}.weight")
        error, _ = relative_errors(weight, layer.to(device), None)
        records[name] = LinearRecord(tuple(values), tuple(places), error)
    return fold_records(records, stacks)
