"""Read the calibration data of ``plan`` and ``convert``, and say what is to come."""

import sys
from dataclasses import replace
from typing import Any

from lowrank_ft_cli.memory import free_bytes, processes_that_share

from lowrank_ft.console import human_bytes, human_seconds
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.estimate import measure, peak_bytes, stages, weight_bytes, work_of
from lowrank_ft.conversion.prepare import Prepared
from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.factorization.plan import Plan


def read_calibration(prepared: Prepared, model: Any, processes: Processes = ONE) -> Calibration:
    """All of the calibration data, of which the model may have to write a part first.

    Raises:
        DataError: too little.
    """
    calibration = prepared.calibration(model, progress=True, processes=processes)
    own = f", {prepared.own_tokens:,} of them written by the model" if prepared.given and prepared.own_tokens else ""
    held = sum(b["input_ids"].numel() for b in calibration.held_out if "input_ids" in b)
    rest = f"; {held:,} more are held out" if held else ""
    print(f"calibration: {calibration.tokens:,} tokens of {calibration.source}{own}{rest}", file=sys.stderr)
    return calibration


def print_estimate(
    prepared: Prepared,
    model: Any,
    plan: Plan,
    allocation: str,
    method: str,
    may_drop: bool = False,
    processes: Processes = ONE,
) -> Prepared:
    """One line: the stages of the work, what they take here, and what makes it less.

    Args:
        may_drop: whether distillation is left out, and a note says so, where memory is too small for it.
        processes: who shares the work; the main one decides.

    Returns:
        The settings that will do.
    """
    speed = measure(model, plan, prepared.sample(model))
    work = work_of(prepared.outline(), prepared.own_tokens, allocation, method)
    if may_drop and work.distilled:
        device = str(next(model.parameters()).device)
        free, needed = free_bytes(device), peak_bytes(model, plan, speed, work)
        # Each process has read its weights by now, and the rest comes for each of them.
        may_drop = processes_that_share(device) * (needed - weight_bytes(model)) > free
    if may_drop and work.distilled:
        print(f"note: distillation would need about {human_bytes(needed)} of memory, and {human_bytes(free)} are free "
              "beside the model, so it is left out; --distill-epochs 1 does it nevertheless", file=sys.stderr)  # fmt: skip
        prepared = replace(prepared, settings={**prepared.settings, "distill_epochs": 0.0})
        work = replace(work, distilled=0)
    prepared = replace(prepared, settings=processes.agreed(prepared.settings))
    parts = stages(speed, work.divided(processes.count))
    dearest = max(parts, key=lambda s: s.seconds)
    listed = ", ".join(f"{s.name} {human_seconds(s.seconds)}" for s in parts)
    # What trains nothing is the fast effort already.
    cheaper = f"--effort fast or {dearest.flag}" if work.refined or work.distilled else dearest.flag
    where = f"{processes.count} processes like this" if processes.count > 1 else "this device"
    print(
        f"estimate for {where}: {human_seconds(sum(s.seconds for s in parts))} ({listed}), "
        f"about {human_bytes(peak_bytes(model, plan, speed, work))} of memory; {cheaper} takes less",
        file=sys.stderr,
    )  # fmt: skip
    return prepared
