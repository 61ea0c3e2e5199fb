"""The optimizer of block refinement and distillation: AdamW on factors, and on norms and biases beside them."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.errors import DivergedError
from lowrank_ft.factorization.solvers import Factors, balance
from lowrank_ft.nn import lowrank_layers
from lowrank_ft.schedule import lr_factor_at


def factors_of(module: nn.Module) -> list[Tensor]:
    """``U, V, U, V, ...`` of its factored linears."""
    return [p for _, layer in lowrank_layers(module) for p in (layer.U.weight, layer.V.weight)]


def vectors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Their parameters of one dimension that are trained at all: the scales of norms, and biases."""
    found = {id(p): p for m in modules for p in m.parameters() if p.dim() == 1 and p.requires_grad}
    return [p for p in found.values() if p.is_floating_point()]


class FactorTrainer:
    """AdamW on the factors of a module, and on ``vectors`` beside them; the learning rate rises over a tenth, then falls to zero.

    Weight decay is off: it would pull a product that is meant to stay ``W`` toward zero. Parameters of 16 bits are
    trained on a float32 copy, because an update of a thousandth of a bfloat16 number would be rounded away.
    Gradients are summed over the calls of :meth:`add` until the next :meth:`step`, and over the processes.
    """

    def __init__(
        self,
        module: nn.Module,
        steps: int,
        learning_rate: float,
        vectors: Sequence[Tensor] = (),
        processes: Processes = ONE,
    ) -> None:
        self.steps, self.learning_rate, self.processes = steps, learning_rate, processes
        self.factors = factors_of(module)
        self.parameters = [*self.factors, *vectors]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None  # of whatever ran before
        self.optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
        self.done = 0

    def add(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to that of the next step.

        Raises:
            DivergedError: the loss is no longer a number.
        """
        if not math.isfinite(loss.item()):
            raise DivergedError(
                f"the loss of the factors is {loss.item()} after {self.done} of {self.steps} steps; convert in float32 "
                "(--dtype float32), or leave the training out (--refine-epochs 0 --distill-epochs 0)"
            )
        # backward adds each gradient to .grad in place; torch.autograd.grad would hold a second full set of them. A
        # parameter that this batch did not reach (an expert that no token chose) gets none.
        loss.backward(inputs=self.parameters)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master and parameter.grad is not None:
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                parameter.grad = None

    def add_up(self) -> None:
        """Sum the added gradients over the processes."""
        if self.processes.count == 1:
            return
        reached = torch.tensor([m.grad is not None for m in self.masters], dtype=torch.float32)
        reached = reached.to(self.processes.device)
        self.processes.add_up(reached)
        for master, somewhere in zip(self.masters, reached.tolist(), strict=True):
            if somewhere:
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                self.processes.add_up(master.grad)

    def step(self) -> None:
        """One update along the gradients that were added."""
        self.add_up()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * lr_factor_at(self.done, self.steps, self.steps // 10)
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.write()
        self.done += 1

    @torch.no_grad()
    def try_rate(self, start: Sequence[Tensor], rate: float) -> None:
        """Go from ``start`` by what AdamW's first step does: ``rate`` along the signs of the added gradients."""
        for master, value in zip(self.masters, start, strict=True):
            master.copy_(value)
            if master.grad is not None:
                master.sub_(rate * master.grad.sign())
        self.write()

    @torch.no_grad()
    def finish(self) -> None:
        """Split every product evenly again, so that whatever trains next starts from balanced factors."""
        count = len(self.factors)
        for left, right in zip(self.masters[0:count:2], self.masters[1:count:2], strict=True):
            for master, factor in zip((left, right), balance(Factors(left, right)), strict=True):
                master.copy_(factor)
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Put the masters into the parameters of 16 bits that they stand for."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.dtype != master.dtype:
                parameter.copy_(master)


class Best:
    """The best state of the trained parameters so far, by a loss on data that are not trained on."""

    def __init__(self, parameters: Sequence[Tensor], loss: float) -> None:
        self.parameters, self.loss = parameters, loss
        self.kept = [p.detach().to("cpu", copy=True) for p in parameters]

    def offer(self, loss: float) -> bool:
        """Keep the present state if its ``loss`` is lower; whether it is. Not a number is never lower."""
        if not loss < self.loss:
            return False
        self.loss = loss
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            kept.copy_(parameter.detach())
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to it. The masters of 16-bit parameters are written to these by :meth:`FactorTrainer.write`."""
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            parameter.copy_(kept)
