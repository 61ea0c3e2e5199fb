"""What a training run really holds and sends: every tensor alive, and every byte that a collective moves."""

import gc
from collections import Counter

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


def live_bytes() -> int:
    """Bytes of all storages that any tensor of this process refers to."""
    gc.collect()
    # By type: isinstance asks proxies for their class, which may be slow and may warn.
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    storages = {}
    for tensor in tensors:
        if hasattr(tensor, "full_tensor") or tensor.device.type != "cpu":
            continue  # a DTensor is a shell around a local tensor, which is in the list, too
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


class SentBytes(TorchDispatchMode):
    """Counts, by name of the operation, the bytes of the whole result of gathers, and of what reductions reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # first DTensor takes the operation apart, into local ones and collectives
        name = func.name().partition(".")[0]
        if name in ("c10d::_allgather_base_", "_c10d_functional::all_reduce", "c10d::allreduce_"):
            first = args[0]
            for tensor in [first] if isinstance(first, torch.Tensor) else first:
                self.bytes[name] += tensor.numel() * tensor.element_size()
        return func(*args, **(kwargs or {}))
