"""What ``lowrank-ft plan`` does: what a conversion would change, from config and headers alone."""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from lowrank_ft_cli.calibration import read_calibration
from lowrank_ft_cli.memory import memory_of, print_memory
from lowrank_ft_cli.options import calibration_options, device_of, dtypes_of, size_options, source_of
from lowrank_ft_cli.preset import print_training_cost, sequence_length_of
from torch import nn

from lowrank_ft.checkpoints.architecture import check_headers, is_compact, refuse_quantized, skeleton, writes_text
from lowrank_ft.checkpoints.files import TensorInfo
from lowrank_ft.checkpoints.models import load_model
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.console import human_bytes, human_count, print_table
from lowrank_ft.conversion.convert import allocate, spectrum_of
from lowrank_ft.conversion.effort import EFFORTS
from lowrank_ft.conversion.estimate import planned_bytes
from lowrank_ft.conversion.prepare import prepare
from lowrank_ft.costs.flops import training_cost
from lowrank_ft.errors import CheckpointError
from lowrank_ft.factorization.plan import LinearPlan, Plan, make_plan, shape_text
from lowrank_ft.factorization.remainder import dense_remainder, notes
from lowrank_ft.factorization.targets import place_of
from lowrank_ft.report.plots import check_picture_path, require_plotting, save_rank_map

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I64": 8, "I32": 4}
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")


def show_plan(options: argparse.Namespace) -> None:
    picture = Path(options.picture) if options.picture else None
    if picture is not None:
        require_plotting()
        check_picture_path(picture)
    sizes, calibrated = size_options(options), calibration_options(options)
    source = source_of(options)
    config = source.load_config()
    refuse_compact(config, source)
    length = sequence_length_of(options, config, source.name)
    tensors = {} if length is not None and has_no_weights(source) else source.tensors()
    allocation = calibrated.allocation or "uniform"
    if allocation != "uniform" or options.energy is not None:
        device = device_of(options)
        model = load_model(source, dtypes_of(options, config, device)[1], device)
        plan = make_plan(model, **vars(sizes), spectrum=spectrum_of(model))
        if allocation != "uniform":
            # Nothing is fitted: as many tokens as convert takes for the fit would not change the ranks.
            few = replace(calibrated, calibration_tokens=calibrated.calibration_tokens or EFFORTS["fast"].tokens)
            data = read_calibration(prepare(few, source, model), model)
            plan = allocate(model, plan, allocation, data, progress=True)
    else:
        model = skeleton(config, source.name, source.trust_remote_code)
        check_headers(model, tensors, source.name)
        plan = make_plan(model, **vars(sizes))
    cost = None if length is None else training_cost(model, plan, options.tokens, length)
    memory = memory_of(plan, options, model) if options.memory else None
    conversion = conversion_bytes(plan, options, config, model) if plan.ranks and writes_text(config) else None
    if picture is not None:
        save_rank_map(plan.linears, picture)
    if options.json:
        extra = {
            "stays_dense": dense_remainder(model, plan) or None,
            "training": None if cost is None else asdict(cost),
            "memory": memory,
            "conversion_bytes": conversion,
        }
        print(json.dumps(plan.to_dict() | {k: v for k, v in extra.items() if v is not None}, indent=2))
        return
    print_plan(plan)
    if sizes.param_ratio is not None and calibrated.allocation is None:
        print("note      these ranks go by shape; convert gives more to the linears that matter more, for the same total "
              "(--allocation loss with --calibration-data shows that, slowly)")  # fmt: skip
    print_remainder(model, plan)
    if cost is not None and length is not None:
        print_training_cost(cost, options.tokens, length)
    if memory is not None:
        print_memory(memory)
    if tensors:
        print_stored(plan, tensors)
    if conversion is not None:
        print(f"convert   about {human_bytes(conversion['default'])} of memory, {human_bytes(conversion['fast'])} with --effort "
              f"fast, {human_bytes(conversion['stream'])} with --stream; and the Python process")  # fmt: skip
    if picture is not None:
        print(f"picture   {picture}")


def conversion_bytes(plan: Plan, options: argparse.Namespace, config: Any, model: Any) -> dict[str, int]:
    """Peak memory of the ways to convert, in the dtype that the device computes in; the model is cast to it."""
    computed = dtypes_of(options, config, device_of(options))[1]
    if isinstance(computed, torch.dtype):
        model.to(computed)
    found = {name: planned_bytes(model, plan, EFFORTS[name]) for name in ("default", "fast")}
    return {
        "default": found["default"]["whole"],
        "fast": found["fast"]["whole"],
        "stream": found["default"]["streamed"],
    }


def has_no_weights(source: Source) -> bool:
    """Whether a folder describes a model that is not trained yet; a config is enough to count what that will cost."""
    folder = source.folder
    return folder is not None and not any(p.name.endswith(_WEIGHT_FILES) for p in folder.iterdir())


def print_stored(plan: Plan, tensors: dict[str, TensorInfo]) -> None:
    """Size of the weight files before, and about what it will be."""
    stored = sum(_BYTES.get(t.dtype, 4) * prod(t.shape) for t in tensors.values())
    per_parameter = stored / max(1, sum(prod(t.shape) for t in tensors.values()))
    saved = (plan.model_parameters - plan.converted_model_parameters) * per_parameter
    print(f"on disk   {human_bytes(stored)} -> about {human_bytes(stored - saved)}")


def print_remainder(model: nn.Module, plan: Plan, to_stderr: bool = False) -> None:
    """Say what is large and stays dense, such as experts, and why."""
    for note in notes(model, plan):
        print(f"note      {note}", file=sys.stderr if to_stderr else sys.stdout)


def refuse_compact(config: object, source: Source) -> None:
    """Raise a CheckpointError where the model is factored or quantized already."""
    refuse_quantized(config, source.name)
    if is_compact(config):
        raise CheckpointError(
            f"{source.name} is compact already; convert the dense model that it came from, "
            "or make a dense one of it with lowrank-ft merge"
        )


def print_plan(plan: Plan, to_stderr: bool = False) -> None:
    """One row for all linears of a kind (same place in every block), then the totals."""
    kinds: dict[str, list[LinearPlan]] = defaultdict(list)
    for p in plan.linears:
        kinds[place_of(p.name)].append(p)
    rows = []
    for kind, members in kinds.items():
        ranks = [p.rank for p in members if p.rank is not None]
        shapes = {shape_text(p) for p in members}
        low, high = (min(ranks), max(ranks)) if ranks else (0, 0)
        shown = "dense" if not ranks else str(low) if low == high else f"{low}-{high}"
        if ranks and len(ranks) < len(members):
            shown += f" ({len(members) - len(ranks)} dense)"
        rows.append(
            (
                kind, str(len(members)), shape_text(members[0]) if len(shapes) == 1 else "various",
                shown,
                human_count(sum(p.dense_parameters for p in members)), human_count(sum(p.parameters for p in members)),
            )
        )  # fmt: skip
    columns = ("linear", "count", "out x in", "rank", "parameters", "after")
    print_table(columns, rows, to_stderr=to_stderr)
    before, after = plan.model_parameters, plan.converted_model_parameters
    stream = sys.stderr if to_stderr else sys.stdout
    print(f"targeted  {human_count(plan.target_parameters)} -> {human_count(plan.factored_parameters)} parameters"
          f" (param ratio {plan.param_ratio:.3f}; as plain factors, in training, {human_count(plan.trained_parameters)})",
          file=stream)  # fmt: skip
    print(f"model     {human_count(before)} -> {human_count(after)} parameters ({after / before:.1%})", file=stream)
    if plan.trained_parameters > plan.target_parameters:
        print("note      in training the factors have more parameters than the dense linears; finetune --trainable lora "
              "trains few of them, and plan --memory compares", file=stream)  # fmt: skip
    dense = [p for p in plan.linears if p.rank is None]
    if dense:
        print(
            f"note      {len(dense)} of {len(plan.linears)} stay dense: {dense[0].name}: {dense[0].note}", file=stream
        )
