"""Sets of tensors on disk, whole or in shards, in safetensors only; either form is read into either kind of tensor.

    FOLDER/NAME.safetensors     one process has whole tensors, and writes them
    FOLDER/NAME-shards/*        every process writes the parts that it holds, at the same time

The shards are written and read by torch's distributed checkpointing (DCP) with its safetensors storage, whose files
carry the place of each part. DCP's usual storage is not used: it keeps that in a pickle. As the place of a part is on
disk, any number of processes can read what any other number wrote.
"""

import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_ft.errors import CheckpointError

Like = Callable[[str], Tensor | None]


def is_sharded(tensor: object) -> bool:
    """Whether this process holds only a part of it (a ``DTensor``)."""
    return hasattr(tensor, "full_tensor")


def unique_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the second and later names of tied weights; contiguous, as safetensors wants them."""
    seen: set[Any] = set()
    unique = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):  # another process's part may be empty, so the address of the part does not tell
            key: Any = id(tensor)
        else:
            key = (tensor.data_ptr(), tensor.shape, tensor.device, tensor.dtype)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        unique[name] = tensor.detach() if is_sharded(tensor) else tensor.detach().contiguous()
    return unique


def write_whole(tensors: Mapping[str, Tensor], folder: Path, name: str) -> None:
    """One file; the file appears whole or not at all. For one process, and tensors without duplicates."""
    draft = folder / f".{name}.safetensors.partial"
    save_file(dict(tensors), draft)
    draft.replace(folder / f"{name}.safetensors")


def write_shards(tensors: Mapping[str, Tensor], folder: Path, name: str) -> None:
    """A file per process; all processes call it, into one folder that all of them see. Not atomic."""
    from torch.distributed import checkpoint as dcp

    path = folder / f"{name}-shards"
    path.mkdir(parents=True, exist_ok=True)
    dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(path), save_distributed=True))


def exists(folder: Path, name: str) -> bool:
    """Whether there is something for :func:`read`."""
    return (folder / f"{name}.safetensors").is_file() or (folder / f"{name}-shards").is_dir()


def remove(folder: Path, name: str, whole: bool) -> None:
    """The ``whole`` file, or else the shards, if they are there."""
    if whole:
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    else:
        shutil.rmtree(folder / f"{name}-shards", ignore_errors=True)


def read(folder: Path, name: str, like: Like = lambda name: None) -> dict[str, Tensor]:
    """Every tensor of the set; whole ones on the CPU, unless ``like`` says otherwise.

    Args:
        like: for the name of a tensor, one whose sharding the result takes over if the shapes agree, or None. If it
            gives a sharded tensor, all processes must call this together, and each reads its own part.

    Raises:
        CheckpointError: the files are missing or damaged.
    """
    whole = folder / f"{name}.safetensors"
    try:
        return _read_whole(whole, like) if whole.is_file() else _read_shards(folder / f"{name}-shards", like)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no readable {name}: {str(error).splitlines()[0]}") from error


def _read_whole(path: Path, like: Like) -> dict[str, Tensor]:
    from torch.distributed.tensor import distribute_tensor

    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            tensor, model = file.get_tensor(name), like(name)
            if model is not None and is_sharded(model) and model.shape == tensor.shape:
                target: Any = model
                # Every process reads the file itself; no source rank means that nothing is sent.
                tensor = distribute_tensor(
                    tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None
                )
            tensors[name] = tensor
    return tensors


def _read_shards(path: Path, like: Like) -> dict[str, Tensor]:
    from torch.distributed import checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(path))
    found = reader.read_metadata().state_dict_metadata
    if not found:
        raise CheckpointError(f"{path} holds no shards; the checkpoint is not whole")
    tensors: dict[str, Tensor] = {}
    for name, entry in found.items():
        facts: Any = entry
        # DCP would leave the part of a missing file as the memory happens to be.
        if sum(math.prod(chunk.sizes) for chunk in facts.chunks) != math.prod(facts.size):
            raise CheckpointError(f"{path} lacks a part of {name}; a shard is missing, so copy the folder again")
        model = like(name)
        if model is not None and is_sharded(model) and model.shape == facts.size:
            tensors[name] = torch.empty_like(model, dtype=facts.properties.dtype, requires_grad=False)
        else:
            tensors[name] = torch.empty(facts.size, dtype=facts.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        alone = not any(is_sharded(t) for t in tensors.values())
        dcp.load(dict(tensors), storage_reader=reader, no_dist=alone)
    return tensors
