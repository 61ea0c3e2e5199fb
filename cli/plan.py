"""``lowrank-ft plan``: what a conversion would change, from config and headers alone."""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from lowrank_ft_cli.calibration import read_calibration
from lowrank_ft_cli.options import device_of, dtype_of, size_options, source_of

from lowrank_ft.allocation import ALLOCATIONS
from lowrank_ft.console import human_bytes, human_count, print_table
from lowrank_ft.conversion import allocate, spectrum_of
from lowrank_ft.errors import CheckpointError
from lowrank_ft.evaluation import context_length
from lowrank_ft.hub.pictures import check_picture_path, require_plotting, save_rank_map
from lowrank_ft.hub.source import Source, is_compact, load_model, skeleton
from lowrank_ft.memory import MODES, Architecture, Settings, estimate
from lowrank_ft.plan import LinearPlan, Plan, make_plan
from lowrank_ft.ranks import break_even_rank
from lowrank_ft.schedule import require_choice
from lowrank_ft.targets import kind_of

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I64": 8, "I32": 4}


def run(options: argparse.Namespace) -> None:
    picture = Path(options.picture) if options.picture else None
    if picture is not None:
        require_plotting()
        check_picture_path(picture)
    source = source_of(options)
    config = source.load_config()
    refuse_compact(config, source)
    tensors = source.tensors()
    allocation = options.allocation or "uniform"
    require_choice("--allocation", allocation, ALLOCATIONS)
    if allocation != "uniform" or options.energy is not None:
        weights = load_model(source, dtype_of(options), device_of(options))
        plan = make_plan(weights, **size_options(options), spectrum=spectrum_of(weights))
        if allocation != "uniform":
            plan = allocate(weights, plan, allocation, read_calibration(options, source, weights), progress=True)
    else:
        plan = make_plan(skeleton(config, source.name, source.trust_remote_code), **size_options(options))
    memory = (
        memory_of(plan, options, skeleton(config, source.name, source.trust_remote_code)) if options.memory else None
    )
    if picture is not None:
        save_rank_map(plan.linears, picture)
    if options.json:
        print(json.dumps({**plan.to_dict(), **({"memory": memory} if memory else {})}, indent=2))
        return
    print_plan(plan)
    stored = sum(_BYTES.get(t.dtype, 4) * prod(t.shape) for t in tensors.values())
    per_parameter = stored / max(1, sum(prod(t.shape) for t in tensors.values()))
    saved = (plan.model_parameters - plan.converted_model_parameters) * per_parameter
    print(f"on disk   {human_bytes(stored)} -> about {human_bytes(stored - saved)}")
    if memory is not None:
        print_memory(memory)
    if picture is not None:
        print(f"picture   {picture}")


def memory_of(plan: Plan, options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Peak memory of a training step in every mode, with the settings that it holds for."""
    settings = Settings(
        batch_size=options.batch_size,
        block_size=context_length(
            options.block_size, getattr(model.config, "max_position_embeddings", None), options.model
        ),
        dtype="float32" if options.dtype == "auto" else options.dtype,
        mixed_precision=options.mixed_precision,
        optim=options.optim,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        device=torch.device(options.device or "cuda").type,
    )
    architecture = Architecture.of(model)
    modes = [{"mode": m.name, **asdict(estimate(plan, architecture, m, settings))} for m in MODES]
    return {"settings": asdict(settings), "modes": modes}


def print_memory(memory: dict[str, Any]) -> None:
    """One row for each mode."""
    settings, parts = memory["settings"], ("weights", "guide", "optimizer", "gradients", "activations", "peak")
    rows = [(m["mode"], *(human_bytes(m[p]) if m[p] else "" for p in parts)) for m in memory["modes"]]
    title = f"memory of training, {settings['batch_size']} x {settings['block_size']} tokens, {settings['dtype']}"
    if settings["mixed_precision"] != "no":
        title += f", {settings['mixed_precision']} arithmetic"
    print_table(("mode", *parts), rows, title=f"{title}, {settings['optim']}, on {settings['device']}")
    print(f"peak      of one process, tensors only; LoRA and QLoRA of rank {settings['lora_r']} on the same linears")


def refuse_compact(config: object, source: Source) -> None:
    """Raise a CheckpointError where the model is factored already."""
    if is_compact(config):
        raise CheckpointError(
            f"{source.name} is compact already; convert the dense model that it came from, "
            "or make a dense one of it with lowrank-ft merge"
        )


def print_plan(plan: Plan, to_stderr: bool = False) -> None:
    """One row for all linears of a kind (same place in every block), then the totals."""
    kinds: dict[str, list[LinearPlan]] = defaultdict(list)
    for p in plan.linears:
        kinds[kind_of(p.name)].append(p)
    rows = []
    for kind, members in kinds.items():
        ranks = [p.rank for p in members if p.rank is not None]
        shapes = {p.shape for p in members}
        low, high = (min(ranks), max(ranks)) if ranks else (0, 0)
        shown = "dense" if not ranks else str(low) if low == high else f"{low}-{high}"
        if ranks and len(ranks) < len(members):
            shown += f" ({len(members) - len(ranks)} dense)"
        shape = members[0].shape
        rows.append(
            (
                kind, str(len(members)), f"{shape[0]} x {shape[1]}" if len(shapes) == 1 else "various",
                f"{break_even_rank(shape):.4g}" if len(shapes) == 1 else "", shown,
                human_count(sum(p.dense_parameters for p in members)), human_count(sum(p.parameters for p in members)),
            )
        )  # fmt: skip
    columns = ("linear", "count", "out x in", "break-even", "rank", "parameters", "after")
    print_table(columns, rows, to_stderr=to_stderr)
    before, after = plan.model_parameters, plan.converted_model_parameters
    stream = sys.stderr if to_stderr else sys.stdout
    print(f"targeted  {human_count(plan.target_parameters)} -> {human_count(plan.factored_parameters)} parameters"
          f" (param ratio {plan.param_ratio:.3f})", file=stream)  # fmt: skip
    print(f"model     {human_count(before)} -> {human_count(after)} parameters ({after / before:.1%})", file=stream)
    dense = [p for p in plan.linears if p.rank is None]
    if dense:
        print(
            f"note      {len(dense)} of {len(plan.linears)} stay dense: {dense[0].name}: {dense[0].note}", file=stream
        )
