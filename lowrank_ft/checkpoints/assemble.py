"""Put a checkpoint together from files of single blocks, and from what is in none of them."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from lowrank_ft.checkpoints.files import INDEX_FILE

_LARGEST = "500MB"  # of the files of the rest, each of which is in memory once


def assemble(model: Any, folder: Path, parts: Mapping[Path, Sequence[str]], read: Callable[[str], Tensor]) -> None:
    """Write the weights of ``model``, which is on the meta device, into ``folder``: a file for each part, and an index.

    Args:
        parts: files with the names of their tensors. They are linked where the file system can, so that they stay.
        read: gives the tensors that are in none of the parts, by name; they are cast to the dtype of the model's.
    """
    written = {name for names in parts.values() for name in names}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    own = model.state_dict()
    rest = {name: tensor for name, tensor in own.items() if name not in written and name not in tied}
    split = split_torch_state_dict_into_shards(
        rest, filename_pattern="rest{suffix}.safetensors", max_shard_size=_LARGEST
    )
    files: list[tuple[Path, Sequence[str]]] = list(parts.items())
    for file_name, names in split.filename_to_tensors.items():
        tensors = {n: read(n).to(own[n].dtype) if own[n].is_meta else own[n].cpu() for n in names}
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / file_name, metadata={"format": "pt"})
        files.append((folder / file_name, names))
    index: dict[str, str] = {}
    size = 0
    for i, (file, held) in enumerate(files, 1):
        target = folder / f"model-{i:05d}-of-{len(files):05d}.safetensors"
        if file.parent == folder:
            file.replace(target)
        else:
            _link(file, target)
        index |= dict.fromkeys(held, target.name)
        size += target.stat().st_size
    table = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / INDEX_FILE).write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # a file system without links
        shutil.copyfile(file, target)
