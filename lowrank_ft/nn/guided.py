"""Self-guided training: a dense branch, the *guide*, whose share ``alpha`` falls from 1 to 0.

    dense       y = alpha * W x + (1 - alpha) * U (V x) + bias        Wei et al. 2024, arXiv 2407.09835
    residual    y = U (V x) + alpha * R x + bias,   R = W - U0 V0

``dense`` trains ``W`` (the paper). ``residual`` holds the part of the pretrained weight that the factors dropped, and
is not trained: at alpha = 1 it is exactly the pretrained function, with full gradients to both factors from the first
step. Both are exactly the compact layer at alpha = 0, and ``end_guidance`` then drops the guide for good.

Stochastic guidance saves half of the guide's cost: in each optimizer step, a layer keeps its guide with probability
alpha and computes the formula above, and otherwise computes the factors alone, ``U (V x) + bias``. :func:`set_gates`
decides that outside forward, which draws no random numbers, so an activation that is computed twice is the same twice.

``alpha`` is no LoRA ``lora_alpha``: it is a share, the same for every layer, a function of the global step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ft.errors import require_choice
from lowrank_ft.factorization.solvers import working_dtype
from lowrank_ft.nn.lowrank_linear import LowRankLinear
from lowrank_ft.nn.quantized_guide import QuantizedGuideLinear, check_guide_bits
from lowrank_ft.schedule import keeps_guide

GUIDES = ("residual", "dense")


class GuideLinear(nn.Module):
    """The guide's matrix ``(out, in)``, without bias. A class of its own so that FSDP can make it a unit.

    A guide that is not trained is a Parameter without gradient rather than a buffer: DDP re-broadcasts buffers at every step, and
    FSDP does not shard them.
    """

    def __init__(self, weight: Tensor, trainable: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trainable)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, trainable={self.weight.requires_grad}"


class GuidedLowRankLinear(LowRankLinear):
    """A :class:`LowRankLinear` with a guide. Once the guide is dropped it computes exactly what its parent does.

    Attributes:
        guide: the dense branch, or None after :meth:`drop_guide`.
        kind: one of ``GUIDES``.
        alpha: share of the guide, a float32 scalar buffer of its own in every layer. It is not saved: it follows from
            the step. A tensor rather than a number, so that a compiled graph does not change as it moves.
        guide_gate: False where stochastic guidance leaves the guide out of this step, at no cost. A Python bool, so a
            compiled graph changes with it: leave the model uncompiled while :func:`set_gates` is in use.
        guide_enabled: False skips the guide in :func:`compact_view`.
    """

    alpha: Tensor
    guide_state = ("guide",)  # names under which a state dict holds what goes with the guide

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guide: GuideLinear | QuantizedGuideLinear | None = None
        self.kind = "residual"
        self.guide_enabled = True
        self.guide_gate = True
        self.register_buffer("alpha", torch.ones((), dtype=torch.float32, device=self.weight.device), persistent=False)

    @classmethod
    def from_lowrank(
        cls, layer: LowRankLinear, dense_weight: Tensor, kind: str, bits: int | None = None
    ) -> "GuidedLowRankLinear":
        """Put a guide beside the factors of ``layer``, whose parameters are shared, not copied.

        Args:
            dense_weight: ``W (out, in)``; for ``residual`` the product of the present factors is taken off.
            kind: one of ``GUIDES``.
            bits: 4 to pack a residual guide; None for the dtype of the factors.
        """
        require_choice("guide", kind, GUIDES)
        check_guide_bits(kind, bits)
        meta = {"device": "meta", "dtype": layer.weight.dtype}
        has_bias = layer.bias is not None
        guided = cls(layer.in_features, layer.out_features, layer.rank, has_bias, layer.transposed, **meta)
        guided.V, guided.U, guided.bias = layer.V, layer.U, layer.bias
        guided.weight = layer.weight
        guided.alpha = torch.ones((), dtype=torch.float32, device=layer.weight.device)
        guided.kind = kind
        weight = dense_weight.detach()
        if kind == "residual":
            work = working_dtype(layer.U.weight.device)
            product = layer.U.weight.detach().to(work) @ layer.V.weight.detach().to(work)
            weight = weight.to(product) - product  # rounded once, when it is stored
        if bits is None:
            weight = weight.to(layer.U.weight).clone(memory_format=torch.contiguous_format)
            guided.guide = GuideLinear(weight, trainable=kind == "dense")
        else:
            guided.guide = QuantizedGuideLinear(weight.to(layer.U.weight.device))
        return guided.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        # In this order: a graph compiled in compact_view then asks for nothing that ends with the guide.
        if not self.guide_enabled or not self.guide_gate or self.guide is None:
            return super().forward(x)
        y, guided = self.U(self.V(x)), self.guide(x)
        if self.kind == "residual":
            y = y + self.alpha * guided
        else:
            y = self.alpha * guided + (1 - self.alpha) * y
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def set_alpha(self, alpha: float) -> None:
        self.alpha.fill_(alpha)

    def drop_guide(self) -> list[nn.Parameter]:
        """Remove the guide; return its parameters, so that the caller can clear their optimizer state."""
        parameters = [] if self.guide is None else list(self.guide.parameters())
        self.guide = None
        # As in compact_view, so that what was compiled there serves for the compact model, too.
        self.guide_enabled, self.guide_gate = False, True
        return parameters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GuidedLowRankLinear":
        exact = self.alpha
        super()._apply(fn, recurse)
        if self.alpha.dtype != torch.float32:  # .to(bfloat16) would round the schedule
            self.alpha = exact.to(self.alpha.device)
        return self


def guided_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that still carry a guide: anything with ``set_alpha`` and ``drop_guide`` whose ``guide`` is not None."""
    for name, module in model.named_modules():
        if hasattr(module, "drop_guide") and getattr(module, "guide", None) is not None:
            yield name, module


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Set the share of the guide, 0 to 1, in every guided layer."""
    for _, layer in guided_layers(model):
        layer.set_alpha(alpha)


def set_gates(model: nn.Module, step: int, alpha: float, seed: int) -> int:
    """Stochastic guidance: decide for this optimizer step which layers keep their guide (:func:`keeps_guide`).

    Call it before the step's first forward pass, next to :func:`set_alpha`, and with the same values on all processes.
    A trainable guide that is left out gets no gradient: the optimizer skips it in this step, and DDP needs
    ``find_unused_parameters``.

    Args:
        step: completed optimizer steps.
        alpha: share of the guide in this step, and the probability that a layer keeps it.

    Returns:
        How many layers keep their guide.
    """
    layers = [layer for _, layer in guided_layers(model)]
    for i, layer in enumerate(layers):
        layer.guide_gate = keeps_guide(seed, step, i, alpha)
    return sum(layer.guide_gate for layer in layers)


def end_guidance(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Drop every guide from the model, and its state from the optimizer, in place.

    ``U``, ``V`` and their optimizer state are untouched. Parameter groups keep their number and order (a group of
    guides stays behind empty), because resuming needs the same groups on both sides.

    Returns:
        Bytes of parameters that were let go, gradients and optimizer state not counted.
    """
    dropped = [p for _, layer in list(guided_layers(model)) for p in layer.drop_guide()]
    if optimizer is not None and dropped:
        gone = {id(p) for p in dropped}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for parameter in dropped:
            optimizer.state.pop(parameter, None)
    return sum(p.numel() * p.element_size() for p in dropped)


@contextmanager
def compact_view(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its export would: the guides are skipped, at no cost, and come back after."""
    layers = [layer for _, layer in guided_layers(model)]
    for layer in layers:
        layer.guide_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.guide_enabled = True


def compact_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without guides: what the deployed model holds."""
    guides = tuple(f"{name}.{part}." for name, layer in guided_layers(model) for part in layer.guide_state)
    return {k: v for k, v in model.state_dict().items() if not (guides and k.startswith(guides))}
