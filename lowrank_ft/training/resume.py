"""Checkpoints to resume from: safetensors and JSON only, bit for bit, whole or not at all, on the disk before others go.

    checkpoints/step-00000120/
        model.safetensors       every weight, the guides' too while they are there; tied weights once
        optimizer.safetensors   the optimizer's state under the parameters' names: ``exp_avg.<name>``, ...
        rng-0.safetensors       random state of process 0, ...
        config.json             the model's config with its ranks, so that ``lowrank-ft export`` needs nothing else
        trainer_state.json      step, phase and what must not change between the two runs

Under FSDP2 each process writes what it holds, into ``model-shards/`` and ``optimizer-shards/`` in place of the first
two (see :mod:`lowrank_ft.checkpoints.sharded`). Either form is read by any number of processes, sharded or not.

Names, not positions, tie state to parameters, so a group that lost its guides cannot shift the others' state.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_ft.checkpoints import sharded as tensor_files
from lowrank_ft.checkpoints.atomic import sync, sync_folder, take_place
from lowrank_ft.checkpoints.sharded import is_sharded, unique_tensors
from lowrank_ft.errors import TrainingStateError
from lowrank_ft.nn import compact_state_dict
from lowrank_ft.reading import kind_of, read_object
from lowrank_ft.training.metrics import METRICS_FILE
from lowrank_ft.training.optimizers import restore_state, saved_state

FOLDER = "checkpoints"
BEST = "best"
BEST_FILE = "best.json"
STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"step-(\d{8})")


_KINDS: dict[str, tuple[type, ...]] = {
    "step": (int,), "guided": (bool,), "best_loss": (int, float, type(None)), "best_step": (int, type(None)),
    "must_match": (dict,), "scaler": (dict,),
}  # fmt: skip


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands.

    Attributes:
        step: completed optimizer steps.
        guided: whether the checkpoint still holds the guides.
        best_loss: lowest evaluation loss so far.
        best_step: where it was reached.
        must_match: options and data facts on which an exact resume depends.
        scaler: state of the fp16 gradient scaler; empty without one.
    """

    step: int
    guided: bool
    best_loss: float | None
    best_step: int | None
    must_match: dict[str, Any]
    scaler: dict[str, Any]


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / FOLDER / f"step-{step:08d}"


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    folder = output_dir / FOLDER
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file())


def has_steps(output_dir: Path) -> bool:
    """Whether there are checkpoints, whole or not."""
    return any(_NAME.fullmatch(p.name) for p in (output_dir / FOLDER).glob("*"))


def remove_drafts(output_dir: Path) -> None:
    """Remove checkpoints that were being written, such as when the disk was full."""
    folder = output_dir / FOLDER
    for draft in (*folder.glob(".step-*.partial"), folder / BEST / ".draft"):
        shutil.rmtree(draft, ignore_errors=True)


def remove_all(output_dir: Path) -> None:
    """Remove the weights, the checkpoints and the records of a run, finished or not, and nothing else."""
    weights = [path for pattern in ("config.json", "model*.safetensors*") for path in output_dir.glob(pattern)]
    metrics = output_dir / METRICS_FILE
    if weights or (output_dir / FOLDER).is_dir():
        metrics.touch()  # says that this is a run, for the next one if this one is killed here
    # The config first: weights without one do not load, so they are not taken for the result of the next run.
    for path in weights:
        path.unlink(missing_ok=True)
    folder = output_dir / FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and (
            path.name == BEST or _NAME.fullmatch(path.name.removeprefix(".").removesuffix(".partial"))
        ):
            shutil.rmtree(path)
    if metrics.exists():
        metrics.write_text("", encoding="utf-8")  # not before: weights never lie beside the records of another run


def is_of_run(checkpoint: Path | None, output_dir: Path) -> bool:
    """Whether this is one of the run in ``output_dir``, and not of another run, nor None."""
    return checkpoint is not None and checkpoint.resolve().parent == (output_dir / FOLDER).resolve()


def is_auto(wanted: object) -> bool:
    """Whether this means the newest checkpoint; transformers' users say ``true``."""
    return str(wanted).lower() in ("auto", "true")


def resolve_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The checkpoint that ``--resume-from-checkpoint`` means: ``auto``, or ``true``, is the newest of the run.

    Raises:
        TrainingStateError: there is none, or the path is not a checkpoint.
    """
    if is_auto(wanted):
        found = find_checkpoints(output_dir)
        if not found:
            raise TrainingStateError(
                f"{output_dir / FOLDER} holds no checkpoint to resume from; add --overwrite-output-dir to start anew"
            )
        return found[-1]
    path = Path(wanted)
    if not (path / STATE_FILE).is_file():
        raise TrainingStateError(f"{path} is not a training checkpoint (it has no {STATE_FILE})")
    return path


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a state dict has, tied weights once."""
    return unique_tensors(model.state_dict(keep_vars=True))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, ``<key>.<parameter name>`` to tensor."""
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
    return {f"{k}.{names[p]}": value for p, state in optimizer.state.items() for k, value in saved_state(state).items()}


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of :func:`optimizer_tensors`; everything must find its place."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        states.setdefault(name, {})[kind] = tensor
    for name, parameter in model.named_parameters():
        if name in states:
            restore_state(optimizer, parameter, states.pop(name))
    if states:
        raise TrainingStateError(f"the checkpoint has optimizer state for {next(iter(states))}, which the model lacks")


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy into the model; names must agree exactly, up to tied weights.

    Raises:
        TrainingStateError: a name on one side only.
    """
    own = model_tensors(model)
    for extra, problem in ((own.keys() - tensors.keys(), "lacks"), (tensors.keys() - own.keys(), "has, unknown here,")):
        if extra:
            raise TrainingStateError(
                f"{where} {problem} {len(extra)} weights, the first being {sorted(extra)[0]}; "
                "it belongs to another model, rank or phase"
            )
    state = model.state_dict()
    for name, tensor in tensors.items():
        if state[name].shape != tensor.shape:
            raise TrainingStateError(
                f"{where}: {name} is {tuple(tensor.shape)}, and {tuple(state[name].shape)} in this run; "
                "resume with the same shapes and ranks"
            )
        if not (state[name].is_floating_point() and tensor.is_floating_point()) and state[name].dtype != tensor.dtype:
            raise TrainingStateError(
                f"{where}: {name} is {tensor.dtype}, and {state[name].dtype} in this run; resume with the same guide_bits"
            )
        if not is_sharded(tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TrainingStateError(f"{where}: {name} holds NaN or infinity; resume from an earlier checkpoint")
        state[name].copy_(tensor)


def write_tensors(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> None:
    """Weights and optimizer state. The main process calls this; if they are ``sharded``, all do."""
    write = tensor_files.write_shards if sharded else tensor_files.write_whole
    write(model_tensors(model), folder, "model")
    write(unique_tensors(optimizer_tensors(model, optimizer)), folder, "optimizer")


def read_tensors(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The inverse, for a model of the same shape, however it and the files are sharded."""
    load_tensors(model, tensor_files.read(folder, "model", model.state_dict(keep_vars=True).get), folder)
    parameters = dict(model.named_parameters())
    state = tensor_files.read(folder, "optimizer", lambda name: parameters.get(name.partition(".")[2]))
    load_optimizer_tensors(model, optimizer, state)


def write_description(folder: Path, model: nn.Module, architecture: str, state: TrainerState) -> None:
    """The JSON files. ``architecture`` is the class of the model; sharding puts one of its own over that."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_file"):
        config.architectures = [architecture]
        config.to_json_file(folder / "config.json", use_diff=True)
    (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")


def save(
    final: Path, model: nn.Module, architecture: str, optimizer: Any, accelerator: Any, state: TrainerState, keep: int,
    sharded: bool,
) -> None:  # fmt: skip
    """Write a whole checkpoint, or none. All processes call this.

    Args:
        optimizer: torch's own, or accelerate's around it.
        keep: how many checkpoints of the run are left.
    """
    draft = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)  # what a killed run left
    accelerator.wait_for_everyone()
    draft.mkdir(parents=True, exist_ok=True)
    write_rng(draft, accelerator.process_index)
    if sharded or accelerator.is_main_process:
        write_tensors(draft, model, getattr(optimizer, "optimizer", optimizer), sharded)
    if accelerator.is_main_process:
        write_description(draft, model, architecture, state)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        commit(draft, final, keep)
    accelerator.wait_for_everyone()


def write_best(output_dir: Path, model: nn.Module, accelerator: Any, sharded: bool, step: int) -> None:
    """The compact weights of the best evaluation so far, in place of the former ones. All processes call this."""
    folder = output_dir / FOLDER / BEST
    draft = folder / ".draft"
    kept = compact_state_dict(model)
    tensors = {k: v for k, v in model_tensors(model).items() if k in kept}
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if sharded:
        tensor_files.write_shards(tensors, draft, "model")
        accelerator.wait_for_everyone()
    elif accelerator.is_main_process:
        tensor_files.write_whole(tensors, draft, "model")
    if accelerator.is_main_process:
        (draft / BEST_FILE).write_text(json.dumps({"step": step}), encoding="utf-8")
        sync(draft)
        (folder / BEST_FILE).unlink(missing_ok=True)  # what is there now is of no step until it is whole
        sync_folder(folder)
        for path in draft.iterdir():
            if path.name == BEST_FILE:
                continue
            if (target := folder / path.name).is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        tensor_files.remove(folder, "model", whole=sharded)  # left by a run that was sharded otherwise
        sync_folder(folder)
        os.replace(draft / BEST_FILE, folder / BEST_FILE)
        draft.rmdir()
        sync_folder(folder)
        _sync_above(folder)


def read_best(output_dir: Path, model: nn.Module, step: int) -> bool:
    """Load those of ``step`` into the model, which has no guides any more; False where there are none.

    There are others where the run was resumed from a checkpoint in another folder, or where one that was killed after its
    last checkpoint had come to better ones. All processes call this.
    """
    folder = output_dir / FOLDER / BEST
    if not tensor_files.exists(folder, "model") or not (folder / BEST_FILE).is_file():
        return False
    if read_object(folder / BEST_FILE, TrainingStateError).get("step") != step:
        return False
    load_tensors(model, tensor_files.read(folder, "model", model.state_dict(keep_vars=True).get), folder)
    return True


def write_rng(folder: Path, rank: int) -> None:
    """Random state of this process. Training draws from torch alone."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, folder / f"rng-{rank}.safetensors")


def read_rng(folder: Path, rank: int) -> None:
    """Restore it; nothing happens where the checkpoint has none for this process."""
    path = folder / f"rng-{rank}.safetensors"
    if not path.is_file():
        return
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def read_state(folder: Path) -> TrainerState:
    """Raises TrainingStateError where the file is not one that this release wrote, or not of this checkpoint."""
    path = folder / STATE_FILE
    found = read_object(path, TrainingStateError, nan=True)
    for name, kinds in _KINDS.items():
        if name not in found:
            raise TrainingStateError(f"{path} lacks {name}; resume from an earlier checkpoint")
        value = found[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TrainingStateError(
                f"{path}: {name} is {kind_of(value)}, which a run does not write; resume from an earlier checkpoint"
            )
    unknown = sorted(found.keys() - _KINDS.keys())
    named = _NAME.fullmatch(folder.resolve().name)
    if unknown:
        raise TrainingStateError(f"{path} holds {unknown[0]}, which this release does not know; update it")
    if found["step"] < 0 or (named and int(named[1]) != found["step"]):
        raise TrainingStateError(
            f"{path}: step is {found['step']}, and the folder is {folder.name}; resume from an earlier checkpoint"
        )
    return TrainerState(**found)


def commit(draft: Path, final: Path, keep: int) -> None:
    """Give a finished draft its name, and remove all but it and the newest, so that ``keep`` are left.

    It is on the disk by then: a power cut that follows must not leave the run without any.
    """
    sync(draft)
    take_place(draft, final)
    _sync_above(final)
    shutil.rmtree(draft, ignore_errors=True)  # what was there before
    # Those of a run that was resumed from another folder may have higher numbers than this one.
    others = [p for p in find_checkpoints(final.parent.parent) if p != final]
    for old in others[: max(0, len(others) - keep + 1)]:
        shutil.rmtree(old)


def _sync_above(path: Path) -> None:
    """The name of a folder in ``checkpoints``, and those of the folders that lead to it: the run may have just made them."""
    for folder in path.absolute().parents[:3]:
        sync_folder(folder)


def remove_later(output_dir: Path, checkpoint: Path, step: int) -> list[str]:
    """Remove the checkpoints after ``step`` of the run that goes on from there, and return their names.

    They belong to a continuation that was given up: ``auto`` would take them for this one's. Nothing happens where
    ``checkpoint``, from which the run was restored, lies in another folder.
    """
    if not is_of_run(checkpoint, output_dir):
        return []
    folder = output_dir / FOLDER
    later = sorted(p for p in folder.iterdir() if (named := _NAME.fullmatch(p.name)) and int(named[1]) > step)
    for path in later:
        shutil.rmtree(path)
    return [path.name for path in later]
