"""The linears that one of vLLM's is made of: filled part by part as a checkpoint is read, then run.

A dense piece computes ``y = W x``; a factored one what :class:`~lowrank_ft.nn.LowRankLinear` computes, in the same three
forms. Each holds the rows and columns of this process only. Needs torch alone: the products are made by a function that
vLLM's method hands in, so that they run on vLLM's kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.errors import CheckpointError
from lowrank_ft.factorization.pivoting import Pivoted, whole
from lowrank_ft.factorization.solvers import Factors
from lowrank_ft.integrations.vllm.plan import Piece, Span

Product = Callable[[Any, Tensor], Tensor]
"""Of a :class:`Matrix` and ``x (..., in)``."""


class Matrix(nn.Module):
    """Holds ``weight (out, in)``, and nothing else: what vLLM's kernels want to find their weight on."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def plain_product(matrix: Matrix, x: Tensor) -> Tensor:
    return nn.functional.linear(x, matrix.weight)


class Stored(nn.Module):
    """One linear of the checkpoint. Its parts come in any order; the last one to come fills it.

    Args:
        piece: what is stored, and what of it is wanted here.
        dtype: of the parameters, whatever the checkpoint's is.
    """

    def __init__(self, piece: Piece, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.piece = piece
        self.filled = False
        self._parts: dict[str, Tensor] = {}
        shapes = piece.local_shapes()
        self.matrices = nn.ModuleDict({n: Matrix(s, dtype, device) for n, s in shapes.items() if len(s) == 2})
        if "order" in shapes:
            self.order = nn.Parameter(
                torch.arange(shapes["order"][0], dtype=torch.int32, device=device), requires_grad=False
            )

    def load(self, part: str, tensor: Tensor) -> None:
        """Take ``part`` of the checkpoint: ``U``, ``V``, ``order``, or ``weight``, which of a factored one is its tripwire.

        Raises:
            CheckpointError: it is not of the shape that ``config.json`` says.
        """
        piece = self.piece
        name = f"{piece.name}.{part}.weight" if part in ("U", "V") else f"{piece.name}.{part}"
        if part == "weight" and piece.rank is not None and tensor.numel() == 1:
            return
        expected = piece.stored_shapes().get(part)
        if expected != tuple(tensor.shape):
            kind = "dense" if piece.rank is None else f"of rank {piece.rank} and pivot {piece.pivot}"
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, and config.json says that {piece.name} is {kind}, with "
                f"{expected or 'no such tensor'}; the folder mixes files of two checkpoints, or its weights are transposed"
            )
        self._parts[part] = tensor
        if len(self._parts) == len(piece.stored_shapes()):
            self._fill()

    def missing(self) -> list[str]:
        """The parts that the checkpoint did not have."""
        return [] if self.filled else sorted(set(self.piece.stored_shapes()) - set(self._parts))

    def _fill(self) -> None:
        piece, parts = self.piece, self._parts
        if piece.rank is None:
            self._set("weight", _rows(parts["weight"], piece.rows), piece.columns)
        else:
            factors: Factors | Pivoted = Factors(parts["U"], parts["V"])
            if piece.pivot is not None:
                pivoted = Pivoted(parts["U"], parts["V"], parts["order"], piece.pivot)
                factors = pivoted if piece.local_pivot else whole(pivoted)
                if piece.local_pivot:
                    self.order.data.copy_(pivoted.order)
            # A side that holds the identity is whole here, and has nothing to be cut.
            all_rows, all_columns = (0, factors.U.shape[0]), (0, factors.V.shape[1])
            rows = (all_rows,) if piece.local_pivot == "output" else piece.rows
            self._set("U", _rows(factors.U, rows), (0, piece.rank))
            self._set("V", factors.V, all_columns if piece.local_pivot == "input" else piece.columns)
        self._parts, self.filled = {}, True

    def _set(self, name: str, value: Tensor, columns: Span) -> None:
        matrix: Any = self.matrices[name]
        matrix.weight.data.copy_(value.narrow(1, *columns))

    def middle(self, x: Tensor, product: Product) -> Tensor:
        """``h (..., rank)`` of a factored piece: what is summed over processes that share the inputs."""
        V, rank = self.matrices["V"], self.piece.rank
        if self.piece.local_pivot != "input":
            return product(V, x)
        x = x.index_select(-1, self.order)
        return x[..., :rank] + product(V, x[..., rank:].contiguous())

    def outputs(self, h: Tensor, product: Product) -> Tensor:
        """``y`` of a factored piece from ``h``."""
        y = product(self.matrices["U"], h)
        if self.piece.local_pivot != "output":
            return y
        return torch.cat([h, y], dim=-1).index_select(-1, self.order)

    def forward(self, x: Tensor, product: Product = plain_product) -> Tensor:
        if self.piece.rank is None:
            return product(self.matrices["weight"], x)
        return self.outputs(self.middle(x, product), product)


def _rows(matrix: Tensor, spans: tuple[Span, ...]) -> Tensor:
    parts = [matrix.narrow(0, *span) for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
