"""The two forms of a factored layer: plain factors, which are trained, and pivoted ones, which are stored and run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowrank_ft.errors import TargetError, require_choice
from lowrank_ft.factorization.pivoting import Pivoted, pivot, pivot_side, rounded, unpivot, whole
from lowrank_ft.factorization.solvers import Factors
from lowrank_ft.nn.factored_experts import FactoredExperts, factored_stacks
from lowrank_ft.nn.lowrank_linear import LowRankLinear, lowrank_layers
from lowrank_ft.nn.unfolded import UnfoldedExperts, fold, unfold

FORMS = ("pivoted", "factors")
"""How a compact checkpoint stores its factors: format version 2, the smaller one, and version 1."""


_QUANTIZERS = ("bitsandbytes.", "torchao.", "optimum.quanto.")


def quantized_part(layer: Any) -> str | None:
    """``U`` or ``V``, the one of them that another library holds in fewer bits, or None."""
    for name in ("U", "V"):
        weight = getattr(layer, name).weight
        if type(weight).__module__.startswith(_QUANTIZERS) or not weight.is_floating_point():
            return name
    return None


def require_float_factors(layer: Any) -> None:
    """Raise a TargetError if the numbers of the factors are not there, for another library has packed them."""
    part = quantized_part(layer)
    if part is not None:
        raise TargetError(
            f"the factors of this model are quantized ({type(getattr(layer, part)).__name__} with "
            f"{type(getattr(layer, part).weight).__name__}); load the compact checkpoint without quantization_config, or "
            "call model.dequantize() first, where the library can do that"
        )


def layer_factors(layer: Any) -> Factors:
    """``U (out, r)`` and ``V (r, in)`` of a factored layer in either form, in its dtype, without gradient.

    Raises:
        TargetError: they are quantized.
    """
    require_float_factors(layer)
    return Factors(layer.U.weight.detach(), layer.V.weight.detach()) if layer.pivot is None else whole(_parts(layer))


def _parts(layer: Any) -> Pivoted:
    """What a pivoted layer holds, without gradient."""
    return Pivoted(layer.U.weight.detach(), layer.V.weight.detach(), layer.order, layer.pivot)


@contextmanager
def stored_as(model: nn.Module, form: str, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, every factored layer of ``model`` is of this form and without guide; afterwards it is what it was.

    Experts are folded inside.

    Args:
        form: one of ``FORMS``. A layer of full rank has no pivoted form that is smaller, and is plain factors in both.
        dtype: of the factors inside; None for the one that they have.
    """
    before: dict[str, nn.Module] = {}
    try:
        store(model, form, dtype, before)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def store(model: nn.Module, form: str, dtype: torch.dtype | None, before: dict[str, nn.Module]) -> None:
    """As :func:`stored_as`, for good; ``before`` is told what was there, by name."""
    require_choice("form", form, FORMS)
    for name, module in list(model.named_modules()):
        if isinstance(module, FactoredExperts | UnfoldedExperts):
            before[name] = module
            model.set_submodule(name, _experts_as(module, form, dtype))
    for name, layer in list(lowrank_layers(model)):
        before[name] = layer
        model.set_submodule(name, pivoted(layer, dtype) if form == "pivoted" else plain(layer, dtype))


def _experts_as(experts: FactoredExperts | UnfoldedExperts, form: str, dtype: torch.dtype | None) -> nn.Module:
    """Folded ones of this form, without guides; ``experts`` itself if that is what it is."""
    if isinstance(experts, FactoredExperts):
        stacks: list[Any] = list(experts.factors.values())
        sides = [(s.pivot, pivot_side((s.out_features, s.in_features), s.rank)) for s in stacks]
        same = all(pivot == (side if form == "pivoted" else None) for pivot, side in sides)
        if same and dtype in (None, stacks[0].U.dtype):
            return experts
        experts = unfold(experts)
    return fold(experts, lambda layer: pivoted(layer, dtype) if form == "pivoted" else plain(layer, dtype))


def unpivot_layers(model: nn.Module) -> int:
    """Make plain balanced factors, the form in which they are trained, of every pivoted layer, in place.

    Call it before the optimizer is made: the parameters are new ones. :func:`lowrank_ft.attach_guides` and the trainer
    of this package do it themselves.

    Returns:
        How many layers were pivoted; a stack of experts counts once.
    """
    found = [(name, layer) for name, layer in lowrank_layers(model) if layer.pivot is not None]
    for name, layer in found:
        model.set_submodule(name, plain(layer))
    stacks = [(name, stack) for name, stack in factored_stacks(model) if stack.pivot is not None]
    for name in dict.fromkeys(name.rpartition(".")[0] for name, _ in stacks):
        experts: Any = model.get_submodule(name)
        model.set_submodule(name, _experts_as(experts, "factors", None))
    return len(found) + len(stacks)


def pivoted(layer: LowRankLinear, dtype: torch.dtype | None = None) -> LowRankLinear:
    """The deployed layer of ``layer`` in its pivoted form (``layer`` itself if that is what it is), without guide."""
    require_float_factors(layer)
    dtype = dtype or layer.U.weight.dtype
    side = pivot_side((layer.out_features, layer.in_features), layer.rank)
    if side is None:
        return plain(layer, dtype)
    if layer.pivot is not None and dtype == layer.U.weight.dtype:
        return layer
    parts = pivot(layer_factors(layer), side) if layer.pivot is None else _parts(layer)
    return _deployed(layer, rounded(parts, dtype) if dtype.itemsize == 2 else parts, dtype)


def plain(layer: LowRankLinear, dtype: torch.dtype | None = None) -> LowRankLinear:
    """The deployed layer of ``layer`` as plain factors, without guide; those of a pivoted layer become balanced."""
    require_float_factors(layer)
    dtype = dtype or layer.U.weight.dtype
    if layer.pivot is None and type(layer) is LowRankLinear and dtype == layer.U.weight.dtype:
        return layer
    if layer.pivot is None:
        return _deployed(layer, layer_factors(layer), dtype)
    return _deployed(layer, unpivot(_parts(layer)), dtype)


def _deployed(layer: LowRankLinear, parts: Factors | Pivoted, dtype: torch.dtype) -> LowRankLinear:
    side = parts.side if isinstance(parts, Pivoted) else None
    sizes = (layer.in_features, layer.out_features, layer.rank, layer.bias is not None, layer.transposed)
    new = LowRankLinear(*sizes, device="meta", dtype=dtype, pivot=side)
    for own, old, value in ((new.U, layer.U, parts.U), (new.V, layer.V, parts.V)):
        own.weight = nn.Parameter(value.to(old.weight.device, dtype), old.weight.requires_grad)
    if isinstance(parts, Pivoted):
        new.order = parts.order.to(layer.U.weight.device)  # found on the CPU where the device has no float64
    new.bias, new.weight = layer.bias, layer.weight
    return new.train(layer.training)
