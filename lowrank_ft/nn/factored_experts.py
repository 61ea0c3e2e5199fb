"""Experts with factored projections: ``y = U_e (V_e x)`` for each token ``x`` that expert ``e`` receives.

This file needs torch alone and imports of the package only its neighbour: its text travels inside every exported
checkpoint (see ``lowrank_ft.checkpoints.plugin``).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ft.nn.lowrank_linear import LowRankLinear, warn_of_pivots

_HOOKED = ("forward", "_old_forward", "_hf_hook")  # accelerate's, which belong to the module that it put them on


class RoutedExperts(nn.Module):
    """What transformers' experts compute, whatever their projections are made of.

        y = sum over the chosen experts e of   w_e down_e(gate(up_e(x)))

    It takes over everything of a stock module (its config, activation, biases, the parameters that stay dense) but the
    projections named in ``without``, and computes what the stock module does by the flags that transformers'
    ``use_experts_implementation`` sets: ``has_gate``, ``has_bias``, ``is_transposed``, ``has_post_expert_norm``.

    Attributes:
        dense_class: the stock class, of which :func:`lowrank_ft.merge` makes a module again.
    """

    def __init__(self, like: nn.Module, without: Sequence[str]) -> None:
        super().__init__()
        adopt(self, like, without)
        self.dense_class: Any = getattr(like, "dense_class", type(like))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Experts' part of the hidden states, ``(tokens, features)`` as they came.

        Args:
            top_k_index: which experts each token goes to, ``(tokens, k)``.
            top_k_weights: with what weights, ``(tokens, k)``.
        """
        experts: Any = self
        tokens, k = top_k_index.shape
        ids, places = top_k_index.reshape(-1).sort(stable=True)
        counts = torch.bincount(ids, minlength=experts.num_experts)
        y = self._project("gate_up_proj" if experts.has_gate else "up_proj", hidden_states[places // k], ids, counts)
        y = self.dense_class._apply_gate(self, y) if experts.has_gate else experts.act_fn(y)
        y = self._project("down_proj", y, ids, counts)
        if experts.has_post_expert_norm:
            y = experts.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[places, None]
        # A sum over k of each token, which is the same every time; index_add_ on a GPU is not.
        y = y[places.argsort()].view(tokens, k, -1).sum(dim=1)
        return y.to(hidden_states.dtype)

    def _project(self, name: str, x: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        """``x (rows, in)``, sorted by expert, through the projection ``name`` of each row's expert in ``ids``."""
        experts: Any = self
        y = self._product(name, x, ids, counts)
        return y + getattr(experts, f"{name}_bias")[ids].to(y.dtype) if experts.has_bias else y

    def _product(self, name: str, x: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        weight: Tensor = getattr(self, name)
        experts: Any = self
        return grouped(x, weight.transpose(-2, -1) if experts.is_transposed else weight, counts)


class FactoredExperts(RoutedExperts):
    """Experts some or all of whose projections are pairs of stacked factors.

    The buffer under the name of each of these projections is a tripwire of one element, as ``weight`` is one of
    :class:`LowRankLinear`: where this class is not known, loading stops instead of going on with random weights.

    Args:
        like: stock experts, or ones that came from them.
        shapes: of the factored projections, ``(experts, out, in)``.
        ranks: of the same.
        pivots: ``output`` or ``input`` for those that are pivoted.

    Attributes:
        factors: a :class:`StackedFactors` for each of them.
    """

    def __init__(
        self,
        like: nn.Module,
        shapes: Mapping[str, tuple[int, int, int]],
        ranks: Mapping[str, int],
        pivots: Mapping[str, str | None],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(like, tuple(shapes))
        self.factors = nn.ModuleDict()
        for name, shape in shapes.items():
            self.factors[name] = StackedFactors(*shape, ranks[name], pivots.get(name), device, dtype)
            self.register_buffer(name, torch.zeros(1, device=device, dtype=dtype))
        self.train(like.training)

    @classmethod
    def like(
        cls, stock: nn.Module, ranks: Mapping[str, int], pivots: Mapping[str, str | None], device: str | None = None
    ) -> "FactoredExperts":
        """Fresh ones in the place of stock experts, of their shapes and dtype."""
        experts: Any = stock
        stored = {name: getattr(experts, name) for name in ranks}
        order = (0, 2, 1) if experts.is_transposed else (0, 1, 2)
        shapes = {name: tuple(weight.shape[i] for i in order) for name, weight in stored.items()}
        first = next(iter(stored.values()))
        return cls(stock, shapes, ranks, pivots, device or first.device, first.dtype)

    def _product(self, name: str, x: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        if name not in self.factors:
            return super()._product(name, x, ids, counts)
        y: Tensor = self.factors[name](x, ids, counts)
        return y


class StackedFactors(nn.Module):
    """One projection of all experts: ``U (experts, out, rank)`` and ``V (experts, rank, in)``; or pivoted.

    The forms are those of :class:`LowRankLinear`, expert by expert.

    Attributes:
        order: of the pivoted form, int32 ``(experts, out)`` or ``(experts, in)``.
    """

    order: Tensor

    def __init__(
        self,
        experts: int,
        out_features: int,
        in_features: int,
        rank: int,
        pivot: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rows = out_features - rank if pivot == "output" else out_features
        columns = in_features - rank if pivot == "input" else in_features
        if pivot not in (None, "output", "input") or rows < 1 or columns < 1:
            raise ValueError(
                f"experts of {out_features} x {in_features} and rank {rank} have no form with pivot {pivot!r}; it must "
                "be output or input, whichever is longer than the rank, or None"
            )
        self.experts, self.out_features, self.in_features = experts, out_features, in_features
        self.rank, self.pivot = rank, pivot
        self.U = nn.Parameter(torch.empty(experts, rows, rank, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(experts, rank, columns, device=device, dtype=dtype))
        if pivot is not None:
            length = out_features if pivot == "output" else in_features
            order = torch.arange(length, device=device, dtype=torch.int32).repeat(experts, 1)
            self.register_buffer("order", order)

    def forward(self, x: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        """``x (rows, in)``, sorted by the experts ``ids (rows,)``, of which expert e has ``counts[e]``."""
        if self.pivot is None:
            return grouped(grouped(x, self.V, counts), self.U, counts)
        order = self.order[ids].long()
        if self.pivot == "output":
            h = grouped(x, self.V, counts)
            return torch.cat([h, grouped(h, self.U, counts)], dim=-1).gather(-1, order)
        x = x.gather(-1, order)
        return grouped(x[:, : self.rank] + grouped(x[:, self.rank :], self.V, counts), self.U, counts)

    @property
    def numbers(self) -> int:
        """Parameters of both factors of all experts, in the form that they have."""
        redundant = self.rank if self.pivot else 0
        return self.experts * self.rank * (self.in_features + self.out_features - redundant)

    def train(self, mode: bool = True) -> Any:
        if mode and self.pivot is not None and not self.training and self.V.requires_grad:
            warn_of_pivots()
        return super().train(mode)

    def extra_repr(self) -> str:
        pivot = f", pivot={self.pivot}" if self.pivot else ""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"experts={self.experts}, {sizes}, rank={self.rank}{pivot}"


def grouped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``x_i W_e^T`` for the rows ``x (rows, in)``, sorted by expert, and ``weight (experts, out, in)``: ``(rows, out)``."""
    if _has_kernel(x, weight):
        offsets = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x.contiguous(), weight.transpose(-2, -1), offs=offsets)
    # unbind and not weight[e]: the gradient of each slice would be as large as the whole stack.
    parts = zip(x.split(counts.tolist()), weight.unbind(0), strict=True)
    products = [F.linear(part, matrix) for part, matrix in parts if len(part)]
    return torch.cat(products) if products else x.new_zeros(0, weight.shape[1])


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has one kernel for all experts: bfloat16 on newer GPUs, with rows of a multiple of 16 bytes."""
    aligned = all(size % 8 == 0 for size in weight.shape[1:]) and weight.is_contiguous()
    same = x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cuda")
    known = hasattr(F, "grouped_mm") and same and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return known and aligned


def adopt(module: nn.Module, like: nn.Module, without: Sequence[str]) -> None:
    """Give ``module`` all that ``like`` has, by reference, but for the parameters, buffers and modules in ``without``."""
    own = {*nn.Module().__dict__, *_HOOKED}
    module.__dict__.update({k: v for k, v in like.__dict__.items() if k not in own})
    module.training = like.training
    for kind in ("_parameters", "_buffers", "_modules"):
        held = getattr(like, kind).items()
        getattr(module, kind).update({k: v for k, v in held if k not in without and k != "factors"})


def factored_stacks(model: nn.Module) -> Iterator[tuple[str, StackedFactors]]:
    """Names and factors of all factored projections of experts, in module order; the names are those of the dense ones."""
    for name, module in model.named_modules():
        if isinstance(module, FactoredExperts):
            for leaf, stack in module.factors.items():
                assert isinstance(stack, StackedFactors)
                yield f"{name}.{leaf}", stack


def stored_form(model: nn.Module) -> tuple[dict[str, int], dict[str, str]]:
    """Name to rank of all that is factored, and name to side of what is pivoted; stacks count as one."""
    ranks: dict[str, int] = {}
    pivots: dict[str, str] = {}
    lists: set[str] = set()
    for name, module in model.named_modules():
        found: dict[str, Any] = {}
        if isinstance(module, FactoredExperts):
            found = {f"{name}.{leaf}": stack for leaf, stack in module.factors.items()}
        elif isinstance(module, RoutedExperts):
            lists |= {f"{name}.{leaf}" for leaf, _ in module.named_children()}
        elif isinstance(module, LowRankLinear):
            owner = name.rpartition(".")[0]
            found = {owner if owner in lists else name: module}
        for key, layer in found.items():
            ranks[key] = layer.rank
            if layer.pivot is not None:
                pivots[key] = layer.pivot
    return ranks, pivots
