"""The weight files of a checkpoint's local folder, looked at without reading weights."""

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from lowrank_ft.errors import CheckpointError, first_line
from lowrank_ft.reading import kind_of, read_object

INDEX_FILE = "model.safetensors.index.json"
RUN_FILE = "run.json"
"""Beside the records of a training run: what an export of one of its checkpoints has to know."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HOW_TO_CONVERT_PICKLE = (
    "load it once with AutoModel.from_pretrained(..., use_safetensors=False) in an environment that you trust, "
    "then model.save_pretrained(folder) writes safetensors"
)


@dataclass(frozen=True)
class TensorInfo:
    """``dtype`` in safetensors' spelling (``BF16``), ``shape``, and the ``file`` of a local one."""

    dtype: str
    shape: tuple[int, ...]
    file: Path | None = None


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a local checkpoint by name, from the safetensors headers alone.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, or there are only pickles.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in safetensors_files(folder):
        tensors |= _header(file)
    return tensors


def check_adapter_file(folder: Path) -> None:
    """Look at the header of an adapter's weights, in the one file that PEFT and transformers read.

    Raises:
        CheckpointError: it is missing, truncated or corrupt, or there is only a pickle.
    """
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        _header(file)
    elif (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder} holds its weights as pickle only (adapter_model.bin), which can run code when it is opened; it is "
            "refused. Load it once with PeftModel.from_pretrained in an environment that you trust, then "
            "model.save_pretrained(folder) writes safetensors"
        )
    else:
        raise CheckpointError(
            f"{folder} has an adapter_config.json and no {file.name}; save the adapter again with "
            "model.save_pretrained(folder)"
        )


def _header(file: Path) -> dict[str, TensorInfo]:
    tensors = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                view = handle.get_slice(name)
                tensors[name] = TensorInfo(view.get_dtype(), tuple(view.get_shape()), file)
    except Exception as error:  # safetensors' own, or of a type of numbers that torch does not know
        raise CheckpointError(
            f"{file} is truncated or corrupt ({first_line(error)}); download it again or restore it from a backup"
        ) from error
    return tensors


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a local checkpoint, all of them present: those that transformers loads.

    Raises:
        CheckpointError: none, only pickles, or a shard that the index names is missing.
    """
    index, single = folder / INDEX_FILE, folder / "model.safetensors"
    if single.is_file():  # an index beside it is not read by transformers, nor by the Hub's client
        return [single]
    if index.is_file():
        names = _indexed_files(index)
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {missing[0]}, which its index names; download it again")
        return [folder / n for n in names]
    raise no_safetensors(str(folder), [p.name for p in folder.iterdir()])


def weight_bytes(folder: Path) -> int:
    """The size of what is loaded: not of a second copy beside it, such as Mistral's ``consolidated.safetensors``.

    Raises:
        CheckpointError: see :func:`safetensors_files`.
    """
    return sum(file.stat().st_size for file in safetensors_files(folder))


def _indexed_files(index: Path) -> list[str]:
    """The files that an index names, each beside it."""
    table = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(
            f"{index}: weight_map is {kind_of(table)}; it must be an object that names a file per tensor"
        )
    for tensor, file in table.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or re.search(r"[/\\\x00]", file):
            raise CheckpointError(
                f"{index}: weight_map names {file!r} for {tensor}; it must be a .safetensors file in the same folder"
            )
    return sorted(set(table.values()))


def no_safetensors(name: str, files: list[str]) -> CheckpointError:
    """What to raise for a folder or repository of these files, none of them safetensors."""
    pickles = sorted(f for f in files if f.endswith(_PICKLES))
    if pickles:
        return CheckpointError(
            f"{name} holds its weights as pickle only ({pickles[0]}), which can run code when it is opened; "
            f"it is refused. To convert it, {_HOW_TO_CONVERT_PICKLE}"
        )
    return CheckpointError(f"{name} holds no model.safetensors and no {INDEX_FILE}; it is not a model checkpoint")
