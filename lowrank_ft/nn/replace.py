"""Put a factored layer in the place of a dense linear, and the other way round."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.factorization.solvers import Factors
from lowrank_ft.factorization.targets import is_transposed
from lowrank_ft.nn.factored_experts import FactoredExperts
from lowrank_ft.nn.forms import layer_factors
from lowrank_ft.nn.lowrank_linear import LowRankLinear, lowrank_layers
from lowrank_ft.nn.unfolded import UnfoldedExperts, fold, unfold


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


def merge(model: nn.Module) -> nn.Module:
    """Multiply every ``U @ V`` back into a dense linear, or experts, of the stock class, in place; guides are dropped.

    Returns:
        The same model, now loadable by anything that knows the architecture, and as large as it was before.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, FactoredExperts | UnfoldedExperts):  # one after the other, for a stack is large
            experts = unfold(module) if isinstance(module, FactoredExperts) else module
            _merge_layers(experts)
            model.set_submodule(name, fold(experts))
    _merge_layers(model)
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return model


def _merge_layers(module: nn.Module) -> None:
    for name, layer in list(lowrank_layers(module)):
        module.set_submodule(name, merged(layer))


def merged(layer: LowRankLinear) -> nn.Module:
    """The dense linear, ``nn.Linear`` or ``Conv1D``, that computes what ``layer`` computes without its guide."""
    trained = layer.U.weight.requires_grad or layer.V.weight.requires_grad
    left, right = layer_factors(layer)
    weight = (left.float() @ right.float()).to(layer.U.weight.dtype)
    if layer.transposed:
        from transformers.pytorch_utils import Conv1D

        dense: Any = Conv1D(1, 1)
        dense.nf, dense.nx = layer.out_features, layer.in_features
        dense.weight = nn.Parameter(weight.T.contiguous(), trained)
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, trained)
    dense.bias = layer.bias
    return dense.train(layer.training)
