"""Put a factored layer in the place of a dense linear, and the other way round."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.nn.lowrank_linear import LowRankLinear
from lowrank_ft.solvers import Factors
from lowrank_ft.targets import is_transposed


def factorized(dense: Any, factors: Factors) -> LowRankLinear:
    """The factored layer that takes the place of ``dense``: its dtype, device, bias and training mode."""
    layer = LowRankLinear.like(dense, factors.U.shape[1], device="meta")
    layer.U.weight = nn.Parameter(factors.U.to(dense.weight))
    layer.V.weight = nn.Parameter(factors.V.to(dense.weight))
    layer.bias = dense.bias
    layer.weight = torch.zeros(1, device=dense.weight.device, dtype=dense.weight.dtype)
    return layer.train(dense.training)


def dense_weight(module: Any) -> Tensor:
    """``W`` as ``(out, in)``, however the module stores it."""
    return module.weight.detach().T if is_transposed(module) else module.weight.detach()


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
