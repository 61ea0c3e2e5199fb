"""What ``lowrank-ft convert`` does: a dense checkpoint in, a compact one out."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from lowrank_ft_cli.calibration import print_estimate, read_calibration
from lowrank_ft_cli.options import (
    calibration_options,
    device_of,
    dtypes_of,
    hub_target,
    promise_of,
    shard_size,
    size_options,
    source_of,
)
from lowrank_ft_cli.run_plan import print_plan, print_remainder, refuse_compact
from lowrank_ft_cli.run_stream import check_streams, convert_by_block, must_stream
from transformers import PreTrainedModel

from lowrank_ft.checkpoints.architecture import skeleton, writes_text
from lowrank_ft.checkpoints.models import check_finite, check_runs, load_model
from lowrank_ft.checkpoints.push import push
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.console import shown_command, silent_unless
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.convert import allocate, convert, default_allocation, spectrum_of
from lowrank_ft.conversion.options import CalibrationOptions
from lowrank_ft.conversion.prepare import prepare
from lowrank_ft.conversion.processes import Processes, joined
from lowrank_ft.conversion.promise import Promise, convert_within
from lowrank_ft.conversion.record import ConversionRecord
from lowrank_ft.errors import ConfigError, RankError, TargetError, first_line
from lowrank_ft.export import save_compact
from lowrank_ft.factorization.options import SizeOptions
from lowrank_ft.factorization.plan import Plan, make_plan


def convert_checkpoint(options: argparse.Namespace) -> None:
    source = source_of(options)
    # Everything that can be wrong is looked at before weights are read.
    sizes, calibrated, promise = size_options(options), calibration_options(options), promise_of(options)
    shard_size(options)
    repo_id, device = hub_target(options), device_of(options)
    config = source.load_config()
    refuse_compact(config, source)
    if promise is not None and not writes_text(config):
        raise ConfigError(f"{promise.shown} needs a causal language model, which {source.name} is not; give a size")
    if options.stream:
        check_streams(options, calibrated)
    plan = planned_size(options, sizes, source) if promise is None else None
    with joined(device) as processes, silent_unless(processes.main):
        device = device if processes.count == 1 else processes.device  # each of several has a GPU of its own
        if options.stream or processes.agreed(must_stream(options, source, calibrated, config, device)):
            convert_by_block(options, source, sizes, calibrated, plan, config, device, processes)
        else:
            _convert_in_memory(options, source, sizes, calibrated, promise, plan, config, device, processes)
        print(Path(options.output_dir))
        if repo_id is not None and processes.main:
            print(push(options.output_dir, repo_id, private=options.private, token=options.token))
        processes.wait()


def _convert_in_memory(
    options: argparse.Namespace,
    source: Source,
    sizes: SizeOptions,
    calibrated: CalibrationOptions,
    promise: Promise | None,
    plan: Plan | None,
    config: Any,
    device: str,
    processes: Processes,
) -> None:
    start = time.monotonic()
    stored, computed = dtypes_of(options, config, device)
    model = load_model(source, computed, device)
    check_finite(model, source.name)
    if promise is not None:
        plan = make_plan(model, param_ratio=0.8, **which_of(sizes))  # to estimate the work by; the size is found below
    elif plan is None:
        plan = make_plan(model, **vars(sizes), spectrum=spectrum_of(model))
    ran = check_runs(model) is None
    prepared = prepare(calibrated, source, model) if promise or calibrated.wants_data(writes_text(config)) else None
    method = prepared.settings["method"] if prepared else options.method or "svd"
    if prepared is None and options.method is None:
        print(f"note: a {type(model).__name__} cannot write its own calibration text, so this is plain SVD; "
              "--calibration-data FILE gives a much better model", file=sys.stderr)  # fmt: skip
    by_loss = default_allocation(0.8 if promise else options.param_ratio, prepared is not None)
    allocation = options.allocation or by_loss
    calibration = None
    if prepared is not None:
        shown = "by plan" if options.plan else allocation
        prepared = print_estimate(prepared, model, plan, shown, method, calibrated.distill_epochs is None, processes)
        calibration = read_calibration(prepared, model, processes)
    if promise is not None:
        assert calibration is not None
        kept = convert_within(model, promise, calibration, method, which_of(sizes), True, _say)
        model, plan, record = kept.model, kept.plan, kept.record
        print_plan(plan, to_stderr=True)
    else:
        plan = allocate(model, plan, allocation, calibration, progress=True)
        record = _convert(model, plan, method, calibration, ran, processes)
    if ran:
        _require_runs(model)
    if record.distillation is not None:
        tokens = model.get_output_embeddings() is not None
        unit = "KL to the dense model, nats per token" if tokens else "difference from the dense model's output"
        print("distillation: loss on held-out text {before:.4f} before, {after:.4f} after ({unit})".format(
            **record.distillation, unit=unit), file=sys.stderr)  # fmt: skip
    if not processes.main:
        return
    command = shown_command("lowrank-ft", sys.argv[1:])
    details = record.to_dict(
        plan, command=command, base_model=source.title, method=method,
        allocation="by plan" if options.plan else allocation,
        calibration=calibration, seconds=time.monotonic() - start, processes=processes.count,
    )  # fmt: skip
    save_compact(
        model.to("cpu"), options.output_dir, dtype=stored, companions_from=source.download(), base_model=source.name,
        overwrite=options.overwrite, max_shard_size=shard_size(options), command=command, conversion=details,
    )  # fmt: skip


def planned_size(options: argparse.Namespace, sizes: SizeOptions, source: Source) -> Plan | None:
    """The plan, where the weights are not needed to make it."""
    if options.plan is not None:
        given = [*sizes.given(), *(["allocation"] if options.allocation else [])]
        if given:
            raise RankError(f"--plan sets all ranks; leave --{given[0].replace('_', '-')} out")
        return Plan.load(options.plan)
    if options.energy is not None:
        return None
    return make_plan(skeleton(source.load_config(), source.name, source.trust_remote_code), **vars(sizes))


def _convert(
    model: Any, plan: Plan, method: str, calibration: Calibration | None, ran: bool, processes: Processes
) -> ConversionRecord:
    print_plan(plan, to_stderr=True)
    print_remainder(model, plan, to_stderr=True)
    if not plan.ranks:
        raise RankError(f"every one of the {len(plan.linears)} targeted linears stays dense; lower the rank")
    record = ConversionRecord()
    try:
        convert(model, plan, method=method, calibration=calibration, record=record, progress=True,
                processes=processes)  # fmt: skip
    except (RuntimeError, IndexError, TypeError):  # of a forward pass halfway, where that is why
        if ran:
            _require_runs(model)
        raise
    return record


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def which_of(sizes: SizeOptions) -> dict[str, Any]:
    """Which linears are factorized, without how much is kept of them."""
    return {name: getattr(sizes, name) for name in ("target_modules", "exclude_modules", "rank_multiple")}


def _require_runs(model: PreTrainedModel) -> None:
    if (error := check_runs(model)) is not None:
        raise TargetError(
            f"{type(model).__name__} ran before the conversion and fails after it ({first_line(error)}); one of its "
            "modules reads a weight as a matrix, leave that linear dense with --exclude-modules"
        )
