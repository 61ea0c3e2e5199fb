"""The deployed layer: ``y = U (V x) + bias``, in two forms.

This file needs torch alone and imports nothing of the package: its text travels inside every exported checkpoint
(see ``lowrank_ft.checkpoints.plugin``).
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """``y = U (V x) + bias`` with ``V`` of shape ``(rank, in)`` and ``U`` of shape ``(out, rank)``; or pivoted.

    The pivoted form is the same product in ``rank * rank`` numbers and multiply-adds less, for which a part of one factor
    is the identity (Zhao et al. 2025, arXiv 2501.19090; see ``lowrank_ft.factorization.pivoting``)::

        pivot="output"    h = V x                       y = [h; U h] in the right order      U (out - rank, rank)
        pivot="input"     h = x_taken + V x_others      y = U h                              V (rank, in - rank)

    It is for running and storing. Trained as it is, it learns worse than plain factors, so :meth:`train` warns.

    ``U`` and ``V`` are plain ``nn.Linear`` children, so whatever finds linears (LoRA, quantizers, tensor-parallel
    plans, ``torch.compile``) works inside. ``bias`` stays where the dense layer had it.

    The buffer ``weight`` is a tripwire of one element under the dense weight's name. A loader that does not know this
    layer finds a tensor of the wrong shape and stops; without it, transformers would fill the model with random
    weights and go on. It also answers code that peeks at ``.weight.dtype`` or ``.weight.device``.

    Args:
        transposed: the dense layer stored its weight ``(in, out)``, as GPT-2's ``Conv1D`` does; only ``merge`` asks.
        pivot: None, ``output`` or ``input``; that side must be longer than the rank.

    Attributes:
        order: of the pivoted form, int32 of the length of that side: where each output, or input, is taken from.
    """

    order: Tensor
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
        pivot: str | None = None,
    ) -> None:
        super().__init__()
        rows = out_features - rank if pivot == "output" else out_features
        columns = in_features - rank if pivot == "input" else in_features
        if pivot not in (None, "output", "input") or rows < 1 or columns < 1:
            raise ValueError(
                f"a {out_features} x {in_features} layer of rank {rank} has no form with pivot {pivot!r}; it must be "
                "output or input, whichever is longer than the rank, or None"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.transposed = transposed
        self.pivot = pivot
        self.V = nn.Linear(columns, rank, bias=False, device=device, dtype=dtype)
        self.U = nn.Linear(rank, rows, bias=False, device=device, dtype=dtype)
        if pivot is not None:
            length = out_features if pivot == "output" else in_features
            self.register_buffer("order", torch.arange(length, device=device, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    @classmethod
    def like(
        cls, dense: Any, rank: int, device: torch.device | str | None = None, pivot: str | None = None
    ) -> "LowRankLinear":
        """A fresh layer with the shape, bias and dtype of a dense ``nn.Linear`` or ``Conv1D``; its device, too."""
        transposed = type(dense).__name__ == "Conv1D"
        rows, columns = dense.weight.shape
        out_features, in_features = (columns, rows) if transposed else (rows, columns)
        device = dense.weight.device if device is None else device
        return cls(
            in_features, out_features, rank, dense.bias is not None, transposed, device, dense.weight.dtype, pivot
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pivot is None:
            y = self.U(self.V(x))
        elif self.pivot == "output":
            h = self.V(x)
            y = torch.cat([h, self.U(h)], dim=-1).index_select(-1, self.order)
        else:
            x = x.index_select(-1, self.order)
            y = self.U(x[..., : self.rank] + self.V(x[..., self.rank :]))
        # Under autocast y is of lower precision than the bias, and a plain sum would be promoted.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def numbers(self) -> int:
        """Parameters of both factors, and multiply-adds per token, of the form that the layer has."""
        return self.rank * (self.in_features + self.out_features - (self.rank if self.pivot else 0))

    def train(self, mode: bool = True) -> Any:
        if mode and self.pivot is not None and not self.training and self.V.weight.requires_grad:
            warn_of_pivots()
        return super().train(mode)

    def extra_repr(self) -> str:
        pivot = f", pivot={self.pivot}" if self.pivot else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{pivot}"


def warn_of_pivots() -> None:
    """Say that the form of these factors is not the one to train."""
    warnings.warn(
        "the factors of this model are pivoted, a form for running that learns worse than plain factors; call "
        "lowrank_ft.unpivot(model) before the optimizer is made",
        stacklevel=3,
    )


def lowrank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Names and modules of all factored linears, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            yield name, module
