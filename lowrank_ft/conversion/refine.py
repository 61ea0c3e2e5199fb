"""Train the factors of one block so that it does what its dense twin did.

    minimize over U, V of the block    |block'(H') - block(H)|^2 / |block(H)|^2

``H'`` are the hidden states that reach the block in the model under conversion, ``H`` those in the dense model. Only
``U`` and ``V`` move: norms, biases and everything that is not factorized stay as they were.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowrank_ft.conversion.activations import Activations
from lowrank_ft.conversion.chains import Call
from lowrank_ft.errors import DivergedError
from lowrank_ft.factorization.solvers import Factors, balance
from lowrank_ft.nn import lowrank_layers
from lowrank_ft.schedule import lr_factor_at


def refine_block(
    block: nn.Module,
    hidden: Activations,
    calls: Sequence[Call],
    wanted: Activations,
    masks: Sequence[Tensor | None],
    epochs: int,
    learning_rate: float,
    seed: int = 0,
) -> None:
    """Train the factors of ``block`` to map ``hidden`` to ``wanted``, one batch per step, in place.

    Args:
        hidden: per batch, ``(batch, length, features)`` as the model under conversion gives it to the block.
        calls: per batch, the other arguments of the block.
        wanted: per batch, what the dense block made of the dense hidden states.
        masks: per batch, nonzero ``(batch, length)`` where a token counts; None where all do.

    Raises:
        DivergedError: the error is no longer a number.
    """
    if epochs == 0 or not any(lowrank_layers(block)):
        return
    trainer = FactorTrainer(block, epochs * len(hidden), learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for i in torch.randperm(len(hidden), generator=generator).tolist():
            with torch.enable_grad():
                trainer.step(squared_error(calls[i](block, hidden[i]), wanted[i], masks[i]))
    trainer.finish()


def squared_error(found: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """``|found - wanted|^2 / |wanted|^2`` over the counted tokens of ``(batch, length, features)``, a float32 scalar."""
    difference, size = (found.float() - wanted.float()).square(), wanted.float().square()
    if mask is not None:
        counted = (mask != 0).to(difference)[..., None]
        difference, size = difference * counted, size * counted
    return difference.sum() / size.sum().clamp_min(torch.finfo(torch.float32).tiny)


def factors_of(module: nn.Module) -> list[Tensor]:
    """``U, V, U, V, ...`` of its factored linears."""
    return [p for _, layer in lowrank_layers(module) for p in (layer.U.weight, layer.V.weight)]


class FactorTrainer:
    """AdamW on the factors of a module and nothing else; the learning rate rises over a tenth, then falls to zero.

    Weight decay is off: it would pull a product that is meant to stay ``W`` toward zero. Factors of 16 bits are trained
    on a float32 copy, because an update of a thousandth of a bfloat16 number would be rounded away.
    """

    def __init__(self, module: nn.Module, steps: int, learning_rate: float) -> None:
        self.module, self.steps, self.learning_rate = module, steps, learning_rate
        self.parameters = factors_of(module)
        self.copies = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.copies, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
        self.done = 0

    def step(self, loss: Tensor) -> None:
        """One update along the gradient of ``loss``."""
        if not math.isfinite(loss.item()):
            raise DivergedError(
                f"the loss of the factors is {loss.item()} after {self.done} of {self.steps} steps; convert in float32 "
                "(--dtype float32), or leave the training out (--refine-epochs 0 --distill-epochs 0)"
            )
        # None where this batch did not reach a factor (an expert that no token chose).
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * lr_factor_at(self.done, self.steps, self.steps // 10)
        for copy, gradient in zip(self.copies, gradients, strict=True):
            copy.grad = None if gradient is None else gradient.float()
        nn.utils.clip_grad_norm_(self.copies, 1.0)
        self.optimizer.step()
        self._write(self.copies)
        self.done += 1

    def finish(self) -> None:
        """Split every product evenly again, so that whatever trains next starts from balanced factors."""
        pairs = zip(self.copies[::2], self.copies[1::2], strict=True)
        self._write([f for u, v in pairs for f in balance(Factors(u, v))])

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
