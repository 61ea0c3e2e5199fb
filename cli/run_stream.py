"""What ``lowrank-ft convert --stream`` does: one block after the other, for models that are larger than memory."""

import argparse
import hashlib
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from lowrank_ft_cli.memory import free_bytes, processes_that_share
from lowrank_ft_cli.options import dtypes_of, shard_size
from lowrank_ft_cli.run_plan import print_plan, print_remainder

from lowrank_ft import __version__
from lowrank_ft.checkpoints.architecture import skeleton
from lowrank_ft.checkpoints.files import safetensors_files
from lowrank_ft.checkpoints.on_disk import OnDisk, open_on_disk
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.checkpoints.unfinished import Unfinished, fingerprint, open_unfinished
from lowrank_ft.console import human_bytes, shown_command
from lowrank_ft.conversion.block_sensitivity import squared_spectra_on_disk
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.convert import check_plan, default_allocation, spectrum_of, spend
from lowrank_ft.conversion.effort import EFFORTS
from lowrank_ft.conversion.estimate import streamed_bytes
from lowrank_ft.conversion.options import SELF, CalibrationOptions
from lowrank_ft.conversion.prepare import prepare
from lowrank_ft.conversion.processes import Processes
from lowrank_ft.conversion.record import ConversionRecord
from lowrank_ft.conversion.streamed import Streaming, find_chain
from lowrank_ft.errors import ConfigError, RankError
from lowrank_ft.export import save_parts
from lowrank_ft.factorization.options import SizeOptions
from lowrank_ft.factorization.plan import Plan, count_parameters, make_plan
from lowrank_ft.factorization.targets import LinearSpec
from lowrank_ft.nn.modes import evaluating


def check_streams(options: argparse.Namespace, calibrated: CalibrationOptions) -> None:
    """Refuse what needs the whole model in memory.

    Raises:
        ConfigError: the option is named.
    """
    needs = {
        "--max-loss": options.max_loss,
        "--max-kl": options.max_kl,
        "--adapter": options.adapter,
        "--distill-epochs": calibrated.distill_epochs,
        "--own-share": calibrated.own_share,
    }
    given = next((flag for flag, value in needs.items() if value), None)
    if given is not None:
        raise ConfigError(f"{given} needs the whole model in memory, and --stream keeps one block there; leave one out")
    if calibrated.method != "svd" and calibrated.sources == [SELF]:
        raise ConfigError(
            "with --stream the model cannot write its own calibration text; give --calibration-data FILE, or --method "
            "svd, which needs no text and makes a much worse model"
        )


def must_stream(
    options: argparse.Namespace, source: Source, calibrated: CalibrationOptions, config: Any, device: str
) -> bool:
    """Whether the model does not fit into memory twice, dense and converted, and can be read block by block instead.

    A note says so. Where it cannot be, because of what was asked for, the conversion is tried in memory.
    """
    model = skeleton(config, source.name, source.trust_remote_code)
    computed = dtypes_of(options, config, device)[1]
    size = computed.itemsize if isinstance(computed, torch.dtype) else next(model.parameters()).element_size()
    needed, free = processes_that_share(device) * 2 * size * count_parameters(model), free_bytes(device)
    if needed <= free:
        return False
    need = f"the model needs about {human_bytes(needed)} of memory to be converted, and {human_bytes(free)} are free"
    try:
        check_streams(options, calibrated)
    except ConfigError as error:
        print(f"warning: {need}; {error}", file=sys.stderr)
        return False
    print(f"note: {need}, so one block is read at a time (--stream), and there is no distillation", file=sys.stderr)
    return True


def convert_by_block(
    options: argparse.Namespace,
    source: Source,
    sizes: SizeOptions,
    calibrated: CalibrationOptions,
    planned: Plan | None,
    config: Any,
    device: str,
    processes: Processes,
) -> None:
    """Convert, or go on with a conversion that was broken off, and write the result."""
    start = time.monotonic()
    shard_size(options)
    stored, computed = dtypes_of(options, config, device)
    calibrated = replace(calibrated, distill_epochs=0, own_share=0)
    folder = source.download()
    with open_unfinished(options.output_dir, processes.main) as unfinished:
        with processes.main_first():
            disk = open_on_disk(source, computed, device, unfinished.folder / "resaved")
        calibration = None
        if calibrated.method != "svd" or calibrated.allocation in ("energy", "loss"):
            calibration = prepare(calibrated, source, disk.model).calibration(disk.model, processes=processes)
        plan = planned or _plan_by_energy(open_on_disk(source, computed, device, unfinished.folder / "resaved"), sizes)
        read = safetensors_files(folder) if processes.main else []
        files = {f"weights file {n}": h for n, h in fingerprint(read).items()}
        with processes.main_first():
            begun = unfinished.begin(files | _wanted(options, sizes, calibrated, plan, calibration))
        streaming = Streaming(disk, unfinished, stored, ConversionRecord(), processes)
        if begun:
            print(f"note: going on after {len(unfinished.parts)} blocks that are done", file=sys.stderr)
        print(f"memory: about {human_bytes(streamed_bytes(disk.model, plan, calibration))} for one block at a time, "
              "and the Python process", file=sys.stderr)  # fmt: skip
        try:
            method, allocation, plan = _run(streaming, options, calibrated, plan, calibration)
        except KeyboardInterrupt:
            done = len(unfinished.parts)
            raise KeyboardInterrupt(f"{done} blocks are done and kept, and the same command goes on") from None
        if not processes.main:
            return
        details = streaming.record.to_dict(
            plan, command=shown_command("lowrank-ft", sys.argv[1:]), method=method, allocation=allocation,
            base_model=source.title,
            calibration=calibration, seconds=time.monotonic() - start, processes=processes.count,
        )  # fmt: skip
        save_parts(
            disk.bare(), options.output_dir, unfinished.parts, disk.read, dtype=stored, companions_from=folder,
            base_model=source.name, overwrite=options.overwrite, command=details["command"], conversion=details,
        )  # fmt: skip
        unfinished.remove()


def _run(
    streaming: Streaming,
    options: argparse.Namespace,
    calibrated: CalibrationOptions,
    plan: Plan,
    calibration: Calibration | None,
) -> tuple[str, str, Plan]:
    """Allocate ranks and convert; the method, the allocation and the plan that it came to."""
    disk, unfinished = streaming.disk, streaming.unfinished
    check_plan(plan, disk.model)
    method = calibrated.method or EFFORTS[calibrated.effort].method
    allocation = options.allocation or default_allocation(options.param_ratio, calibration is not None)
    allocation = "by plan" if options.plan else allocation
    returns: Mapping[str, bool] = {}
    if calibration is not None:
        with evaluating(disk.model):
            returns = _chain(disk, unfinished, plan, calibration)
            if allocation in ("energy", "loss"):
                given, seen, blocks = plan, calibration, returns
                plan = Plan.from_dict(
                    unfinished.note("plan", lambda: _allocated(disk, blocks, given, seen, allocation).to_dict())
                )
    print_plan(plan, to_stderr=True)
    print_remainder(disk.model, plan, to_stderr=True)
    if not plan.ranks:
        raise RankError(f"every one of the {len(plan.linears)} targeted linears stays dense; lower the rank")
    if calibration is None or method == "svd":
        streaming.truncate(plan, progress=True)
    else:
        streaming.fit(plan, returns, method, calibration, progress=True)
    return method, allocation, plan


def _chain(disk: OnDisk, unfinished: Unfinished, plan: Plan, calibration: Calibration) -> dict[str, bool]:
    """Looked for once. Afterwards accelerate's hooks are gone, so blocks have to be loaded before they run."""
    returns = unfinished.note("chain", lambda: dict(find_chain(disk, plan, calibration.batches[0])))
    for name in returns:
        disk.unhook(name)
    return dict(returns)


def _allocated(
    disk: OnDisk, returns: Mapping[str, bool], plan: Plan, calibration: Calibration, allocation: str
) -> Plan:
    spectra = squared_spectra_on_disk(disk, returns, plan, calibration, allocation, progress=True)
    return spend(plan, spectra)


def _wanted(
    options: argparse.Namespace,
    sizes: SizeOptions,
    calibrated: CalibrationOptions,
    plan: Plan,
    calibration: Calibration | None,
) -> dict[str, Any]:
    """What has to be the same for a conversion to go on."""
    digest = hashlib.sha256()
    for batch in (*calibration.batches, *calibration.held_out) if calibration is not None else ():
        for name, tensor in batch.items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    chosen = {k: v for k, v in asdict(calibrated).items() if k not in ("activations_dir", "calibration_data")}
    return {
        "size": plan.to_dict()["linears"], "size option": {k: str(v) for k, v in asdict(sizes).items() if v},
        "calibration text": digest.hexdigest(), "dtype": options.dtype, "lowrank-ft version": __version__,
        **{f"--{k.replace('_', '-')}": v for k, v in chosen.items()},
    }  # fmt: skip


def _plan_by_energy(disk: OnDisk, sizes: SizeOptions) -> Plan:
    """A plan that looks at each linear's weight."""
    spectrum = spectrum_of(disk.model)

    def read(spec: LinearSpec) -> torch.Tensor:
        with disk.loaded(spec.name.rpartition(".")[0] if spec.experts else spec.name):
            return spectrum(spec)

    return make_plan(disk.model, **vars(sizes), spectrum=read)
