"""What a run needs before its first step: a folder for it alone, where it goes on from, its Accelerator, its optimizer."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn

from lowrank_ft.checkpoints.companions import begin_run
from lowrank_ft.checkpoints.files import RUN_FILE
from lowrank_ft.checkpoints.folders import check_replaceable, check_writable, where_it_leads
from lowrank_ft.checkpoints.format import QUANT_METHOD
from lowrank_ft.checkpoints.locks import exclusive, is_write_failure, refused_write
from lowrank_ft.errors import ConfigError, OutputError
from lowrank_ft.nn import guided_layers
from lowrank_ft.reading import read_object
from lowrank_ft.training import fsdp, resume
from lowrank_ft.training.metrics import METRICS_FILE
from lowrank_ft.training.optimizers import build_adamw, check_optimizer
from lowrank_ft.training.options import TrainArguments


@contextmanager
def folder_alone(output_dir: str | Path, accelerator: Accelerator) -> Iterator[None]:
    """Inside, no other run may use the folder; all processes call this, and the main one holds a lock until the end.

    The lock is a file beside the folder, so that it is no part of what is exported or pushed.

    Raises:
        OutputError: on all processes: another run uses the folder, or it cannot be written or replaced.
    """
    folder = Path(output_dir)
    path = Path(os.path.abspath(where_it_leads(folder)))  # one lock, whichever of its names a run is given
    problem = None
    with ExitStack() as held:
        if accelerator.is_main_process:
            try:
                check_writable(folder)
                check_replaceable(folder)
                busy = f"another run is training into {folder}; wait for it or end it, or name another --output-dir"
                # Exports have a lock of their own, .NAME.lock, which a run takes at its end.
                held.enter_context(exclusive(path.with_name(f".{path.name}.lock-run"), busy))
            except OutputError as error:
                problem = str(error)
        problem = broadcast_object_list([problem])[0]
        if problem is not None:
            raise OutputError(problem)
        yield


def checkpoint_to_resume(args: TrainArguments, reads: Sequence[Path | None] = ()) -> Path | None:
    """The checkpoint that the options mean, or None for a fresh start.

    Args:
        reads: the folders of the models that the run reads, None for those on the Hub; a fresh start may remove none of them.

    Raises:
        TrainingStateError: it does not exist.
        OutputError: ``output_dir`` cannot be written, or not be replaced when the run ends; or it holds an earlier run or
            a compact checkpoint, and neither resuming that run nor overwriting was asked for; or somebody else's files. The
            checkpoint of another run wants a folder of its own, too.
    """
    folder = Path(args.output_dir)
    check_writable(folder)
    check_replaceable(folder)
    # What a run or an export left, or token files: nothing that a process of this run has put there meanwhile.
    taken = (METRICS_FILE, "config.json", resume.FOLDER, "README.md", "index.json", "*.safetensors")
    used = sorted(p.name for pattern in taken for p in folder.glob(pattern))
    # A job that is queued again is started with the same command. With `auto` it begins anew where there is nothing to
    # resume: the first time, and after it was killed before its first checkpoint.
    begins = resume.is_auto(args.resume_from_checkpoint) and not resume.find_checkpoints(folder)
    begins = begins and (args.overwrite_output_dir or not used or _broken_off(folder, used))
    checkpoint = None
    if args.resume_from_checkpoint and not begins:
        checkpoint = resume.resolve_checkpoint(folder, str(args.resume_from_checkpoint))
        if resume.is_of_run(checkpoint, folder):
            return checkpoint
    home, steps = folder.resolve(), (folder / resume.FOLDER).resolve()
    for path in (*reads, checkpoint):
        if path is not None and (path.resolve() == home or path.resolve().is_relative_to(steps)):
            raise OutputError(
                f"the run reads {path}, which is in --output-dir {folder} and would be replaced; name another "
                "--output-dir"
            )
    if used and not _is_ours(folder):
        rule = "a run wants a folder of its own"
        if args.overwrite_output_dir:
            rule = "--overwrite-output-dir replaces nothing but runs and compact checkpoints"
        raise OutputError(f"{folder} holds {used[0]}, and {rule}; name another --output-dir")
    if used and not begins and not args.overwrite_output_dir:
        can_go_on = bool(resume.find_checkpoints(folder))
        state = "" if can_go_on else " without a checkpoint"
        go_on = "--resume-from-checkpoint auto to resume it, " if can_go_on else ""
        raise OutputError(
            f"{folder} holds an earlier run{state}; add {go_on}--overwrite-output-dir to start anew, or name another "
            "--output-dir"
        )
    return checkpoint


def _is_ours(folder: Path) -> bool:
    """Whether a run wrote it, finished or not, or an export of a compact checkpoint: what overwriting may remove."""
    if (folder / METRICS_FILE).exists() or (folder / RUN_FILE).exists() or resume.find_checkpoints(folder):
        return True
    try:
        entry = read_object(folder / "config.json", OutputError).get("quantization_config")
    except OutputError:
        return False
    return isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD


def _broken_off(folder: Path, used: list[str]) -> bool:
    """Whether all that was found in ``folder`` is of a run that was killed before its first checkpoint."""
    return METRICS_FILE in used and set(used) <= {METRICS_FILE, resume.FOLDER} and not resume.has_steps(folder)


def prepare_folder(output_dir: str | Path, source: Path, export_dtype: torch.dtype, checkpoint: Path | None) -> None:
    """Before the first step, on one process: take an earlier run away, and put there what any export will need.

    Args:
        source: the model's folder, with its tokenizer.
        checkpoint: where the run goes on from. Nothing is taken away where it is one of this folder; None for a fresh start.
    """
    goes_on = resume.is_of_run(checkpoint, Path(output_dir))
    if not goes_on:
        resume.remove_all(Path(output_dir))
    begin_run(output_dir, source, export_dtype, resumes=goes_on)


@contextmanager
def writes_explained(output_dir: str | Path) -> Iterator[None]:
    """Around all that a run writes: where the disk refuses it, what is whole and how to go on.

    Raises:
        OutputError: in place of the system's error, with drafts removed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        if cause is None or not is_write_failure(cause):
            raise
        folder = Path(output_dir)
        resume.remove_drafts(folder)
        whole = resume.find_checkpoints(folder)
        way_on = (
            f"{resume.FOLDER}/{whole[-1].name} is whole: free some space, then resume with --resume-from-checkpoint auto"
            if whole
            else "There was no checkpoint yet: free some space, then start anew with --overwrite-output-dir"
        )
        raise refused_write(folder, cause, way_on) from error


def make_accelerator(args: TrainArguments) -> Accelerator:
    """The Accelerator of a run.

    Raises:
        ConfigError: the launcher is configured for something that is not supported.
    """
    fsdp.refuse_deepspeed()  # before accelerate asks for a package that would not help
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=args.report_to or None,
            project_dir=args.output_dir,
        )
    except ValueError as error:  # an unknown tracker, or a precision that the device lacks
        raise ConfigError(f"accelerate refuses these settings: {str(error).splitlines()[0]}") from error
    fsdp.set_up(accelerator)
    check_optimizer(args.optim, accelerator.device, accelerator.distributed_type == DistributedType.FSDP)
    return accelerator


def make_optimizer(model: nn.Module, args: TrainArguments) -> torch.optim.Optimizer:
    """AdamW over everything that has a gradient: matrices, vectors (no weight decay by default), trainable guides last."""
    guide_ids = {id(p) for _, layer in guided_layers(model) for p in layer.guide.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("no parameter of the model has requires_grad set; there is nothing to train")
    own: list[Tensor] = [p for p in trainable if id(p) not in guide_ids]
    groups = [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": args.weight_decay if args.decay_vectors else 0.0},
        {"params": [p for p in trainable if id(p) in guide_ids], "weight_decay": args.weight_decay},
    ]
    # torch refuses no empty group, and the last one is empty where guides are not trained or gone.
    return build_adamw(args.optim, groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2))


def ddp_handler(given: Any, model: nn.Module, args: TrainArguments) -> Any:
    """The options with which DDP should wrap ``model``: those of the user, and what stochastic guidance needs.

    A trainable guide that its gate leaves out gets no gradient, for which DDP would wait. Told so, DDP finds out in
    every step which those are; they keep no gradient, as on a single process, and the optimizer skips them.
    """
    trainable = any(p.requires_grad for _, layer in guided_layers(model) for p in layer.guide.parameters())
    if args.guide_mode == "full" or not trainable:
        return given
    return replace(given or DistributedDataParallelKwargs(), find_unused_parameters=True)


def compile_model(model: nn.Module, args: TrainArguments) -> None:
    """``torch.compile`` in place, if asked for: names and wrappers stay as they are, and :func:`uncompile` undoes it.

    Gates of guides are Python bools, and every pattern of them would be a graph of its own, until the compiler gives
    up after eight. So stochastic guidance runs uncompiled, and this does nothing before the guides are gone.
    """
    if args.torch_compile and (args.guide_mode == "full" or not any(guided_layers(model))):
        model.compile(backend=args.torch_compile_backend)


def uncompile(model: nn.Module) -> None:
    model._compiled_call_impl = None


def check_compiler(args: TrainArguments, device: torch.device, sharded: bool = False) -> None:
    """Compile something small, so that a missing compiler or backend is found before training.

    Raises:
        ConfigError: it does not work here, or the model is going to be sharded.
    """
    if not args.torch_compile:
        return
    if sharded:
        raise ConfigError("torch_compile and FSDP2 are not supported together; leave torch_compile out, or use DDP")
    try:
        torch.compile(torch.square, backend=args.torch_compile_backend)(torch.ones(2, device=device))
    except Exception as error:  # dynamo, inductor, triton and the C++ compiler all have their own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"torch_compile with torch_compile_backend {args.torch_compile_backend!r} does not work on {device}: "
            f"{reason}; train without it, or choose one of {', '.join(torch.compiler.list_backends())}"
        ) from error
