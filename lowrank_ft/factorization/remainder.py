"""What a plan leaves dense, how much that is, and why.

A matrix is a parameter of two dimensions or more. The share of a plan is that of the matrices that multiply the hidden
states: linears and experts, without embeddings, the output head and convolutions, which no plan factorizes by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from lowrank_ft.factorization.plan import Plan
from lowrank_ft.factorization.targets import (
    NARROWEST_DEFAULT_TARGET,
    block_index,
    is_linear,
    is_read_by_owner,
    is_router,
    place_of,
    projections,
    stack_specs,
    tied_partners,
)

EMBEDDING, HEAD, CONVOLUTION = "an embedding", "the output head", "a convolution"
EXPERTS = "experts stacked in a layout of their own"
_OUTSIDE = (EMBEDDING, HEAD, CONVOLUTION)


@dataclass(frozen=True)
class DensePart:
    """Matrices in the same place of their blocks that stay dense.

    Attributes:
        kind: their name, with ``*`` for the number of the block.
        why: the reason, in a few words.
        parameters: of all of them together.
        layers: how many modules they belong to.
    """

    kind: str
    why: str
    parameters: int
    layers: int


def dense_parts(model: nn.Module, plan: Plan) -> list[DensePart]:
    """Every matrix of ``model`` (which may be on the meta device) that ``plan`` leaves dense, in module order."""
    planned = {p.name if p.experts else f"{p.name}.weight": p for p in plan.linears}
    tied_to = dict(getattr(model, "all_tied_weights_keys", None) or {})
    named = dict(model.named_parameters())
    modules = dict(model.named_modules())
    ends = _end(model, "get_output_embeddings", HEAD) | _end(model, "get_input_embeddings", EMBEDDING)
    parts: dict[tuple[str, str], DensePart] = {}
    for name, parameter in named.items():
        entry = planned.get(name)
        if parameter.dim() < 2 or tied_to.get(name) in named or (entry is not None and entry.rank is not None):
            continue
        why = entry.note if entry is not None else ends.get(id(parameter))
        why = why or _reason(model, modules[name.rpartition(".")[0]], name)
        key = (place_of(name), why)
        known = parts.get(key, DensePart(*key, 0, 0))
        parts[key] = replace(known, parameters=known.parameters + parameter.numel(), layers=known.layers + 1)
    return list(parts.values())


def dense_remainder(model: nn.Module, plan: Plan, least: float = 0.05) -> dict[str, int]:
    """What stays dense, though it is at neither end of the model: parameters by kind, those above ``least`` of it."""
    kinds: dict[str, int] = {}
    for part in _inner(model, plan):
        kinds[part.kind] = kinds.get(part.kind, 0) + part.parameters
    return {kind: count for kind, count in kinds.items() if count > least * plan.model_parameters}


def factored_share(model: nn.Module, plan: Plan) -> float:
    """Parameters of the linears that ``plan`` factorizes, over those of all linears and experts."""
    factored = sum(p.dense_parameters for p in plan.linears if p.rank is not None)
    left = sum(part.parameters for part in dense_parts(model, plan) if part.why not in _OUTSIDE)
    return factored / (factored + left) if factored else 0.0


def notes(model: nn.Module, plan: Plan, least: float = 0.05) -> list[str]:
    """A line for all experts that cannot be factored, and one for each other kind with a share of the model above ``least``."""
    parts = _inner(model, plan)
    experts = [part for part in parts if part.why == EXPERTS]
    lines = []
    if experts:
        layers = max(part.layers for part in experts)
        count = sum(part.parameters for part in experts)
        what = f"experts of {layers} layer{'s' * (layers > 1)} stay dense"
        names = ", ".join(part.kind for part in experts)
        lines.append(_line(what, count, plan, f"{names}: stacked in a layout of their own"))
    for part in parts:
        if part not in experts and part.parameters > least * plan.model_parameters:
            lines.append(_line(f"{part.kind.removesuffix('.weight')} stays dense", part.parameters, plan, part.why))
    return lines


def _line(what: str, count: int, plan: Plan, why: str) -> str:
    return f"{what}: {count / plan.model_parameters:.0%} of the parameters ({why})"


def _inner(model: nn.Module, plan: Plan) -> list[DensePart]:
    """Without what is at the two ends of the model."""
    ends = _end(model, "get_output_embeddings", HEAD) | _end(model, "get_input_embeddings", EMBEDDING)
    outer = {place_of(name) for name, p in model.named_parameters() if id(p) in ends}
    return [part for part in dense_parts(model, plan) if part.kind not in outer]


def _reason(model: nn.Module, owner: nn.Module, name: str) -> str:
    if ".parametrizations." in name:  # such as a convolution with normalized weights
        owner = model.get_submodule(name.partition(".parametrizations.")[0])
    cls = type(owner).__name__
    if isinstance(owner, nn.Embedding) or "Embedding" in cls:
        return EMBEDDING
    if isinstance(owner, nn.modules.conv._ConvNd):
        return CONVOLUTION
    if is_linear(owner):
        return _reason_of_linear(model, name.removesuffix(".weight"), model.get_parameter(name).shape)
    for stack in stack_specs(name.rpartition(".")[0], owner):
        if stack.name == name:
            return _reason_of_linear(model, name, stack.shape)
    if ("expert" in name.lower() or "Expert" in cls) and not projections(owner):
        return EXPERTS
    if isinstance(owner, nn.Linear):
        return f"{cls} is no plain linear"
    return f"a parameter of {cls}, no linear"


def _reason_of_linear(model: nn.Module, name: str, shape: Sequence[int]) -> str:
    if block_index(model, name) is None:
        return "outside of the repeated blocks"
    if min(shape) < NARROWEST_DEFAULT_TARGET:
        return f"narrower than {NARROWEST_DEFAULT_TARGET}"
    if is_router(model, name):
        return "it chooses experts"
    if is_read_by_owner(model, name):
        return f"{type(model.get_submodule(name.rpartition('.')[0])).__name__} reads their weights itself"
    if tied_partners(model, [name]):
        return "layers share their weight"
    return "not among the targets"


def _end(model: nn.Module, get: str, why: str) -> dict[int, str]:
    """The weight at one end of the model, and what it is; nothing where a model has no such end."""
    try:
        weight = getattr(getattr(model, get)(), "weight", None)
    except (AttributeError, NotImplementedError):
        return {}
    return {} if weight is None else {id(weight): why}
