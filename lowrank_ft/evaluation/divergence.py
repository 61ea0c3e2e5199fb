"""The divergence of one next-token distribution from another, in little memory; to measure it, and to train on it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_POSITIONS_AT_ONCE = 128


def divergence(logits: Tensor, reference: Tensor, counted: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(reference / T) || softmax(logits / T))`` in nats, summed over the counted positions.

    A few positions at a time are taken to float32, and their gradient is kept in the dtype of ``logits``: the largest
    tensors are the logits themselves and one of their size.

    Args:
        logits: ``(..., vocabulary)``; gradients go here only.
        reference: of the same shape.
        counted: bool, of the leading shape of ``logits``.
        temperature: ``T``, above 0.

    Returns:
        A scalar, float32 or what the logits have beyond it.
    """
    result: Tensor = _Divergence.apply(logits, reference, counted, temperature)
    return result


class _Divergence(torch.autograd.Function):
    """The gradient is found in the forward pass, where the distributions are at hand: ``(q - p) / T``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor, counted: Tensor, temperature: float) -> Tensor:
        work = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=work, device=logits.device)
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        for places in counted.nonzero().split(_POSITIONS_AT_ONCE):
            at = places.unbind(1)
            q = (logits[at].to(work) / temperature).log_softmax(-1)
            p = (reference[at].to(work) / temperature).log_softmax(-1)
            # 0 * log 0 is 0: some models mask entries of their vocabulary with -inf.
            difference = (p - q).masked_fill_(p.isneginf(), 0.0)
            p.exp_()
            excess = q.exp_().sub_(p)
            # The excess sums to 0, but for rounding: the same rounding of both norms that is in the logarithms.
            # With it a small KL is not lost in the last digits of 1.
            total += difference.mul_(p).add_(excess).sum()
            if gradient is not None:
                gradient[at] = excess.div_(temperature).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None
