"""The deployed layer: ``y = U (V x) + bias``.

This file needs torch alone and imports nothing of the package: its text travels inside every exported checkpoint
(see ``lowrank_ft.checkpoints.plugin``).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """``y = U (V x) + bias`` with ``V`` of shape ``(rank, in)`` and ``U`` of shape ``(out, rank)``.

    ``U`` and ``V`` are plain ``nn.Linear`` children, so whatever finds linears (LoRA, quantizers, tensor-parallel
    plans, ``torch.compile``) works inside. ``bias`` stays where the dense layer had it.

    The buffer ``weight`` is a tripwire of one element under the dense weight's name. A loader that does not know this
    layer finds a tensor of the wrong shape and stops; without it, transformers would fill the model with random
    weights and go on. It also answers code that peeks at ``.weight.dtype`` or ``.weight.device``.

    Args:
        transposed: the dense layer stored its weight ``(in, out)``, as GPT-2's ``Conv1D`` does; only ``merge`` asks.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.transposed = transposed
        self.V = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.U = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    @classmethod
    def like(cls, dense: Any, rank: int, device: torch.device | str | None = None) -> "LowRankLinear":
        """A fresh layer with the shape, bias and dtype of a dense ``nn.Linear`` or ``Conv1D``; its device, too."""
        transposed = type(dense).__name__ == "Conv1D"
        rows, columns = dense.weight.shape
        out_features, in_features = (columns, rows) if transposed else (rows, columns)
        device = dense.weight.device if device is None else device
        return cls(in_features, out_features, rank, dense.bias is not None, transposed, device, dense.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.U(self.V(x))
        # Under autocast y is of lower precision than the bias, and a plain sum would be promoted.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def lowrank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Names and modules of all factored linears, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            yield name, module
