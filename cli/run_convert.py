"""What ``lowrank-ft convert`` does: a dense checkpoint in, a compact one out."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lowrank_ft_cli.calibration import print_estimate, read_calibration
from lowrank_ft_cli.options import (
    calibration_options,
    device_of,
    dtype_of,
    hub_target,
    output_dir_of,
    shard_size,
    size_options,
    source_of,
)
from lowrank_ft_cli.run_plan import print_plan, print_remainder, refuse_compact
from transformers import PreTrainedModel

from lowrank_ft.checkpoints.atomic import check_output_dir
from lowrank_ft.checkpoints.push import push
from lowrank_ft.checkpoints.source import check_finite, check_runs, load_model, skeleton, writes_text
from lowrank_ft.console import shown_command
from lowrank_ft.conversion import ConversionRecord
from lowrank_ft.conversion.convert import allocate, convert, default_allocation, spectrum_of
from lowrank_ft.conversion.effort import EFFORTS
from lowrank_ft.conversion.prepare import prepare
from lowrank_ft.errors import RankError, TargetError, first_line
from lowrank_ft.export import save_compact
from lowrank_ft.factorization.plan import Plan, make_plan


def convert_checkpoint(options: argparse.Namespace) -> None:
    source = source_of(options)
    options.output_dir = output_dir_of(options, source.name)
    # Everything that can be wrong is looked at before weights are read.
    sizes, calibrated = size_options(options), calibration_options(options)
    shard_size(options)
    check_output_dir(options.output_dir, options.overwrite, keep=source.folder)
    repo_id, device = hub_target(options), device_of(options)
    config = source.load_config()
    refuse_compact(config, source)
    plan: Plan | None = None
    if options.plan is not None:
        given = [*sizes.given(), *(["allocation"] if options.allocation else [])]
        if given:
            raise RankError(f"--plan sets all ranks; leave --{given[0].replace('_', '-')} out")
        plan = Plan.load(options.plan)
    elif options.energy is None:
        plan = make_plan(skeleton(config, source.name, source.trust_remote_code), **vars(sizes))

    start = time.monotonic()
    stored, computed = dtypes(options, config, device)
    model = load_model(source, computed, device)
    check_finite(model, source.name)
    if plan is None:
        plan = make_plan(model, **vars(sizes), spectrum=spectrum_of(model))
    ran = check_runs(model) is None
    prepared = prepare(calibrated, source, model) if calibrated.wants_data(writes_text(config)) else None
    method = options.method or (EFFORTS[calibrated.effort].method if prepared else "svd")
    if prepared is None and options.method is None:
        print(f"note: a {type(model).__name__} cannot write its own calibration text, so this is plain SVD; "
              "--calibration-data FILE gives a much better model", file=sys.stderr)  # fmt: skip
    allocation = options.allocation or default_allocation(options.param_ratio, prepared is not None)
    calibration = None
    if prepared is not None:
        print_estimate(prepared, model, plan, "by plan" if options.plan else allocation, method)
        calibration = read_calibration(prepared, model)
    plan = allocate(model, plan, allocation, calibration, progress=True)
    print_plan(plan, to_stderr=True)
    print_remainder(model, plan, to_stderr=True)
    if not plan.ranks:
        raise RankError(f"every one of the {len(plan.linears)} targeted linears stays dense; lower the rank")
    record = ConversionRecord()
    try:
        convert(model, plan, method=method, calibration=calibration, record=record, progress=True)
    except (RuntimeError, IndexError, TypeError):  # of a forward pass halfway, where that is why
        if ran:
            _require_runs(model)
        raise
    if ran:
        _require_runs(model)
    if record.distillation is not None:
        print("distillation: loss on held-out text {before:.4f} before, {after:.4f} after (KL to the dense model, nats "
              "per token)".format(**record.distillation), file=sys.stderr)  # fmt: skip
    command = shown_command("lowrank-ft", sys.argv[1:])
    origin = source.name if source.folder is None else source.folder.resolve().name
    details = record.to_dict(
        plan, command=command, base_model=origin, method=method,
        allocation="by plan" if options.plan else allocation,
        calibration=calibration, seconds=time.monotonic() - start,
    )  # fmt: skip
    save_compact(
        model.to("cpu"), options.output_dir, dtype=stored, companions_from=source.download(), base_model=source.name,
        overwrite=options.overwrite, max_shard_size=shard_size(options), command=command, conversion=details,
    )  # fmt: skip
    print(Path(options.output_dir))
    if repo_id is not None:
        print(push(options.output_dir, repo_id, private=options.private, token=options.token))


def dtypes(options: argparse.Namespace, config: Any, device: str) -> tuple[torch.dtype | None, str | torch.dtype]:
    """What is written (None: what is computed in), and what is computed in.

    A CPU computes in float32, which is more precise there and often faster; a GPU in what the checkpoint has.
    """
    chosen = dtype_of(options)
    if isinstance(chosen, torch.dtype):
        return chosen, torch.float32 if device == "cpu" else chosen
    stored = getattr(config, "dtype", None)
    if device == "cpu" and isinstance(stored, torch.dtype):
        return stored, torch.float32
    return None, chosen


def _require_runs(model: PreTrainedModel) -> None:
    if (error := check_runs(model)) is not None:
        raise TargetError(
            f"{type(model).__name__} ran before the conversion and fails after it ({first_line(error)}); one of its "
            "modules reads a weight as a matrix, leave that linear dense with --exclude-modules"
        )
