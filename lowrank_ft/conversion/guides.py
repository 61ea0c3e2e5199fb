"""Guides for a compact model that goes on training: the dense branch comes from the model that it was made from."""

from torch import Tensor, nn

from lowrank_ft.conversion.unpivot import unpivot
from lowrank_ft.errors import PlanError
from lowrank_ft.factorization.targets import find_linears, is_linear
from lowrank_ft.nn import (
    GuidedLowRankLinear,
    LowRankLinear,
    check_guide_bits,
    fold_experts,
    lowrank_layers,
    unfold_experts,
)
from lowrank_ft.nn.forms import require_float_factors
from lowrank_ft.nn.replace import dense_weight

MIN_COSINE = 0.1  # between factors and the weights that they were made from, mean over the linears


def attach_guides(model: nn.Module, dense_model: nn.Module, guide: str, guide_bits: int | None = None) -> None:
    """Put a guide beside every factored linear of ``model``, from the linear of the same name in ``dense_model``.

    Pivoted factors become plain ones first (:func:`unpivot`), and experts are unfolded: a guided layer for each.

    Args:
        guide: one of ``GUIDES``.
        guide_bits: as in :func:`convert`.

    Raises:
        ConfigError, MissingPackageError: the guide cannot be stored in ``guide_bits`` (see :func:`convert`).
        TargetError: the factors are quantized.
        PlanError: the dense model lacks one of the linears, has it in another shape, or is another model.
    """
    for _, layer in lowrank_layers(model):
        require_float_factors(layer)
    unpivot(model)
    check_guide_bits(guide, guide_bits, next(model.parameters()).device)
    unfold_experts(model)
    stacks = [s.name for s in find_linears(dense_model) if s.experts]
    unfold_experts(dense_model, stacks)
    try:
        _attach(model, dense_model, guide, guide_bits)
    finally:
        fold_experts(dense_model)


def _attach(model: nn.Module, dense_model: nn.Module, guide: str, guide_bits: int | None) -> None:
    modules = dict(dense_model.named_modules())
    prefix = getattr(dense_model, "base_model_prefix", "")
    weights = {name: _matching_dense_weight(modules, prefix, name, layer) for name, layer in lowrank_layers(model)}
    _require_kinship(model, weights)
    for name, layer in list(lowrank_layers(model)):
        weight = weights[name]
        model.set_submodule(name, GuidedLowRankLinear.from_lowrank(layer, weight, guide, guide_bits))


def _require_kinship(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Factors of a matrix point in its direction; those of an unrelated one do not.

    Not their distance: factors that were fitted to outputs may be farther from the weight than zero is. On the small
    Llama of the benchmarks, converted to 0.25 by default, the mean cosine is 0.53 and the smallest 0.10.
    """
    cosines = []
    for name, layer in lowrank_layers(model):
        weight = weights[name].float()
        product = layer.U.weight.detach().float() @ layer.V.weight.detach().float()
        norms = (weight.norm() * product.norm()).item()
        if norms > 0:
            cosines.append((weight * product.to(weight.device)).sum().item() / norms)
    if cosines and (mean := sum(cosines) / len(cosines)) < MIN_COSINE:
        raise PlanError(
            "the guide model is not the one that the checkpoint was made from: the mean cosine between its weights and "
            f"the factors is {mean:.2f}, and {MIN_COSINE} is the least; name the right dense model and revision"
        )


def _matching_dense_weight(modules: dict[str, nn.Module], prefix: str, name: str, layer: LowRankLinear) -> Tensor:
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        module = modules.get(candidate)
        if module is not None and is_linear(module):
            weight = dense_weight(module)
            if tuple(weight.shape) == (layer.out_features, layer.in_features):
                return weight
            raise PlanError(
                f"{name} is {(layer.out_features, layer.in_features)}, but {tuple(weight.shape)} in the guide model; "
                "the guide must be the dense model that the checkpoint was converted from"
            )
    raise PlanError(f"the guide model has no dense linear {name}; give the model that the checkpoint came from")
