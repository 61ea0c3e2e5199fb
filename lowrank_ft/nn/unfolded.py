"""Stacked experts as linears, one for each expert and projection, and back.

    stock experts    <-> UnfoldedExperts of nn.Linear           views of the stacked parameters
    FactoredExperts  <-> UnfoldedExperts of LowRankLinear       views of the stacked factors

Unfolded experts compute the same. Each of their linears is called with the tokens that its expert receives, so all that
is made for linears (calibration, allocation, refinement, guides, adapters) is made for experts, too. Folded ones have one
pair of stacked factors per projection, which is how they are stored and run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.factorization.targets import stack_specs
from lowrank_ft.nn.factored_experts import FactoredExperts, RoutedExperts, StackedFactors, adopt
from lowrank_ft.nn.lowrank_linear import LowRankLinear


class UnfoldedExperts(RoutedExperts):
    """Experts some or all of whose projections are lists of linears, one for each expert."""

    def __init__(self, like: nn.Module, linears: Mapping[str, Sequence[nn.Module]]) -> None:
        super().__init__(like, tuple(linears))
        self.unfolded = tuple(linears)
        for name, members in linears.items():
            self.add_module(name, nn.ModuleList(members))
        self.train(like.training)

    def _product(self, name: str, x: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        if name not in self.unfolded:
            return super()._product(name, x, ids, counts)
        linears: Any = getattr(self, name)
        parts = zip(linears, x.split(counts.tolist()), strict=True)
        # In training all are called, so that every process of a distributed run does the same.
        products = [linear(part) for linear, part in parts if len(part) or self.training]
        return torch.cat(products) if products else x.new_zeros(0, linears[0].out_features)


def unfold(experts: Any, names: Iterable[str] = ()) -> UnfoldedExperts:
    """The same experts with linears in place of stacks, by reference.

    Args:
        experts: stock experts, or factored ones.
        names: of dense projections; those that are factored are unfolded in any case.
    """
    factors: Any = experts.factors if isinstance(experts, FactoredExperts) else {}
    linears = {name: _factored_linears(stack) for name, stack in factors.items()}
    return UnfoldedExperts(experts, linears | {name: _dense_linears(experts, name) for name in names})


def fold(experts: UnfoldedExperts, change: Callable[[LowRankLinear], LowRankLinear] = lambda layer: layer) -> nn.Module:
    """Stacks of the linears: a :class:`FactoredExperts` where some are factored, and stock experts where none are.

    Args:
        change: makes of each factored linear the one that is stacked. All of a projection have one rank and form.
    """
    dense: dict[str, list[Any]] = {}
    factored: dict[str, list[LowRankLinear]] = {}
    for name in experts.unfolded:
        members: Any = getattr(experts, name)
        if isinstance(members[0], LowRankLinear):
            factored[name] = [change(layer) for layer in members]
        else:
            dense[name] = list(members)
    parameters = {name: _stacked([m.weight for m in members]) for name, members in dense.items()}
    if vars(experts)["is_transposed"]:
        for weight in parameters.values():
            weight.data = weight.data.transpose(1, 2).contiguous()
    if factored:
        first = {name: members[0] for name, members in factored.items()}
        shapes = {n: (len(factored[n]), layer.out_features, layer.in_features) for n, layer in first.items()}
        ranks, pivots = {n: layer.rank for n, layer in first.items()}, {n: layer.pivot for n, layer in first.items()}
        dtype = next(iter(first.values())).U.weight.dtype
        folded: Any = FactoredExperts(experts, shapes, ranks, pivots, "meta", dtype)
        for name in dense:
            del folded._modules[name]
    else:
        folded = experts.dense_class.__new__(experts.dense_class)
        nn.Module.__init__(folded)
        adopt(folded, experts, experts.unfolded)
        del folded.dense_class
    del folded.unfolded
    for name, weight in parameters.items():
        folded.register_parameter(name, weight)
    for name, members in factored.items():
        _fill(folded.factors[name], members)
        setattr(folded, name, members[0].weight)  # the tripwire, on the device and of the dtype of the factors
    folded.train(experts.training)
    module: nn.Module = folded
    return module


def unfold_experts(model: nn.Module, names: Iterable[str] = ()) -> None:
    """Unfold, in place, the dense stacks named in ``names`` and all factored experts."""
    chosen = {name: list[str]() for name, module in model.named_modules() if isinstance(module, FactoredExperts)}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        chosen.setdefault(owner, []).append(leaf)
    for owner, leaves in chosen.items():
        model.set_submodule(owner, unfold(model.get_submodule(owner), leaves))


def fold_experts(model: nn.Module) -> None:
    """Fold all unfolded experts of ``model``, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, UnfoldedExperts):
            model.set_submodule(name, fold(module))


def folded_state(tensors: Mapping[str, Tensor], ranks: Iterable[str]) -> dict[str, Tensor]:
    """A state dict of unfolded plain factors as that of folded ones; what else it holds stays as it is."""
    state = dict(tensors)
    for name in ranks:
        if f"{name}.0.U.weight" not in state:
            continue
        owner, _, leaf = name.rpartition(".")
        count = sum(f"{name}.{e}.U.weight" in state for e in range(len(state)))
        for part in ("U", "V"):
            members = [state.pop(f"{name}.{e}.{part}.weight") for e in range(count)]
            state[f"{owner}.factors.{leaf}.{part}"] = torch.stack(members)
        tripwires = [state.pop(f"{name}.{e}.weight") for e in range(count)]
        state[name] = tripwires[0]
    return state


def _dense_linears(experts: Any, name: str) -> list[nn.Module]:
    stacked: nn.Parameter = getattr(experts, name)
    (shape,) = [s.shape for s in stack_specs("", experts) if s.name == f".{name}"]
    linears: list[nn.Module] = []
    for matrix in stacked.detach().unbind(0):
        linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(matrix.T if experts.is_transposed else matrix, stacked.requires_grad)
        linears.append(linear)
    return linears


def _factored_linears(stack: StackedFactors) -> list[nn.Module]:
    linears: list[nn.Module] = []
    for e in range(stack.experts):
        layer = LowRankLinear(
            stack.in_features,
            stack.out_features,
            stack.rank,
            False,
            device="meta",
            dtype=stack.U.dtype,
            pivot=stack.pivot,
        )
        layer.U.weight = nn.Parameter(stack.U.detach()[e], stack.U.requires_grad)
        layer.V.weight = nn.Parameter(stack.V.detach()[e], stack.V.requires_grad)
        layer.weight = stack.U.new_zeros(1)
        if stack.pivot is not None:
            layer.order = stack.order[e]
        linears.append(layer)
    return linears


def _fill(stack: StackedFactors, layers: Sequence[LowRankLinear]) -> None:
    assert len({(layer.rank, layer.pivot) for layer in layers}) == 1, "experts of one projection differ in rank or form"
    stack.U = _stacked([layer.U.weight for layer in layers])
    stack.V = _stacked([layer.V.weight for layer in layers])
    if stack.pivot is not None:
        stack.order = torch.stack([layer.order for layer in layers])


def _stacked(members: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([m.detach() for m in members]), members[0].requires_grad)
