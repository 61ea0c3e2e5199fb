"""Activations of calibration tokens, batch by batch, in memory or on disk."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Activations:
    """A list of tensors, kept in memory, or as safetensors files below ``folder`` where one is given.

    Reading gives each tensor on the device and in the dtype in which it was put in.
    """

    def __init__(self, tensors: Iterable[Tensor] = (), folder: Path | None = None) -> None:
        self._memory: list[Tensor] = []
        self._files: list[tuple[Path, torch.device]] = []
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="activations-") if folder else None
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: Tensor) -> None:
        if self._folder is None:
            self._memory.append(tensor)
            return
        path = Path(self._folder.name) / f"{len(self._files)}.safetensors"
        save_file({"x": tensor.contiguous()}, path)
        self._files.append((path, tensor.device))

    def __len__(self) -> int:
        return len(self._memory) + len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        if self._folder is None:
            return self._memory[index]
        path, device = self._files[index]
        return load_file(path)["x"].to(device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))
