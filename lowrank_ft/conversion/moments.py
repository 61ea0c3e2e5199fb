"""Second moments of a linear's inputs over calibration tokens.

    inputs = sum over tokens of x' x'^T        cross = sum over tokens of x x'^T

``x'`` is what the linear receives in the model under conversion, ``x`` what it receives in the dense model, where that is
wanted. Products are taken in float32 and summed in float64 (float32 on MPS). Padding tokens are left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ft.conversion.processes import Processes
from lowrank_ft.errors import NonFiniteError
from lowrank_ft.factorization.solvers import working_dtype


@dataclass
class Moments:
    """``inputs`` and ``cross``, each ``(in, in)``, over ``tokens`` tokens; None before the first and where not wanted."""

    inputs: Tensor | None = None
    cross: Tensor | None = None
    tokens: int = 0

    def add(self, converted: Tensor, dense: Tensor | None, mask: Tensor | None = None, name: str = "a linear") -> None:
        """Count the tokens of one batch.

        Args:
            converted: ``x'``, ``(..., in)``.
            dense: ``x``, of the same shape; of another (a router chose other tokens), ``x'`` stands in for it. None
                where cross moments are not wanted.
            mask: nonzero where a token counts, of the leading shape of ``converted``; None where all do.

        Raises:
            NonFiniteError: an activation is NaN or infinite; the message names the linear.
        """
        a = rows(converted, mask)
        if len(a) == 0:
            return
        inputs, cross = a.T @ a, None
        if dense is not None:
            cross = inputs if dense.shape != converted.shape else rows(dense, mask).T @ a
        if not torch.isfinite(inputs).all() or (cross is not None and not torch.isfinite(cross).all()):
            raise NonFiniteError(
                f"the inputs of {name} hold NaN or infinity on the calibration data; convert in float32 or bfloat16 "
                "(--dtype), or leave that module dense with --exclude-modules"
            )
        self.inputs = _added(self.inputs, inputs)
        self.cross = self.cross if cross is None else _added(self.cross, cross)
        self.tokens += len(a)

    def add_up(self, processes: Processes, width: int) -> None:
        """Replace all by their sums over the processes, some of which may have seen no token.

        Args:
            width: ``in``.
        """
        if processes.count == 1:
            return
        crossed = processes.total(self.cross is not None) > 0
        self.tokens = int(processes.total(self.tokens))
        if self.tokens == 0:
            return
        zeros = torch.zeros(width, width, dtype=working_dtype(torch.device(processes.device)), device=processes.device)
        if crossed:  # a tensor of its own, which it may not be so far
            self.cross = zeros.clone() if self.cross is None else self.cross.clone()
            processes.add_up(self.cross)
        self.inputs = zeros if self.inputs is None else self.inputs
        processes.add_up(self.inputs)


def _added(total: Tensor | None, product: Tensor) -> Tensor:
    """In place: of the widest linears, moments are the largest tensors there are."""
    return product.to(working_dtype(product.device), copy=True) if total is None else total.add_(product)


def rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """``(..., in)`` as float32 ``(tokens, in)``, without those that the mask leaves out."""
    flat = x.detach().flatten(0, -2).float()
    return flat if mask is None else flat[mask.flatten().to(flat.device) != 0]
