"""Allocation for a model on disk: the numbers of :mod:`lowrank_ft.conversion.sensitivity`, with one block in memory.

forward     through the blocks, one after the other: what enters each block                          for loss alone
top         norm, head and loss, from what leaves the last block: the gradient there                 for loss alone
backward    through the blocks in reverse order: each runs from what entered it, and passes on
            the gradient; the importance of each output                                              for loss alone
forward     through the blocks once more: moments of each linear, and its spectrum
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_ft.checkpoints.on_disk import OnDisk
from lowrank_ft.console import progress_bar
from lowrank_ft.conversion.activations import Activations
from lowrank_ft.conversion.blockwise import Stream
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.chains import Batch, capture, run
from lowrank_ft.conversion.experts import part_of, summed, unfolded
from lowrank_ft.conversion.processes import Processes
from lowrank_ft.conversion.received import dense_moments
from lowrank_ft.conversion.sensitivity import (
    SENSITIVITY_TOKENS,
    GradientSquares,
    frozen,
    gradient_batches,
    own_loss,
    spectra_of,
)
from lowrank_ft.conversion.stubs import Returns, stubs
from lowrank_ft.errors import require_choice
from lowrank_ft.factorization.plan import Plan


def squared_spectra_on_disk(
    disk: OnDisk,
    returns: Returns,
    plan: Plan,
    calibration: Calibration,
    allocation: str,
    progress: bool = False,
) -> dict[str, Tensor]:
    """As :func:`lowrank_ft.conversion.experts.plan_spectra`.

    Memory: one block, what enters it on 8,192 tokens; for ``loss``, before that, what enters each block on 4,096,
    where ``calibration.activations_dir`` names no folder for it.

    Args:
        returns: of the blocks, in their order.
        plan: of linears that lie in the blocks.
        allocation: ``energy`` or ``loss``.
    """
    require_choice("allocation", allocation, ("energy", "loss"))
    importance = None
    if allocation == "loss":
        importance = output_importance_on_disk(disk, returns, plan, calibration, progress)
    model, chain = disk.model, list(returns)
    batches = calibration.first(SENSITIVITY_TOKENS)
    with stubs(model, returns):
        stream = Stream(capture(model, chain, batches, calibration.store()), calibration)
    squares: dict[str, Tensor] = {}
    for name in progress_bar(chain, desc="allocate", unit="block", progress=progress):
        with disk.loaded(name) as block, unfolded(model, part_of(plan, name)) as each:
            left, linears = calibration.store(), [p.name for p in each.linears]
            passed_on = partial(_pass_on, stream, block, name, left)
            # Without a name of their own, so that they are gone before those of the next block are collected.
            squares |= spectra_of(
                model, dense_moments(model, linears, batches, passed_on, calibration.processes), importance,
                calibration.processes,
            )  # fmt: skip
            stream.hidden = left
    return summed(plan, squares)


def output_importance_on_disk(
    disk: OnDisk, returns: Returns, plan: Plan, calibration: Calibration, progress: bool = False
) -> dict[str, Tensor]:
    """As :func:`lowrank_ft.conversion.sensitivity.output_importance`, with the memory of allocation by loss."""
    known = calibration.importance.get(disk.model)
    if known is None:
        few = gradient_batches(calibration)
        with stubs(disk.model, returns):
            stream = Stream(capture(disk.model, list(returns), few, calibration.store()), calibration)
        entered: dict[str, Activations] = {}
        for name in returns:
            entered[name] = stream.hidden
            with disk.loaded(name) as block:
                stream.hidden = stream.after(block, name)
        return _backward(disk, returns, plan, calibration, stream, entered, progress)
    return {n: g for n, g in known.items() if g is not None}


def _backward(
    disk: OnDisk,
    returns: Returns,
    plan: Plan,
    calibration: Calibration,
    stream: Stream,
    entered: dict[str, Activations],
    progress: bool,
) -> dict[str, Tensor]:
    """Through the blocks in reverse order: the mean squared gradient at the outputs of each linear.

    Args:
        stream: what has left the last block.
        entered: what entered each block, of as many batches as gradients are wanted of; is used up.
    """
    chain, processes = list(returns), calibration.processes
    few = gradient_batches(calibration)
    gradients, tokens = _from_the_top(disk, returns, stream.hidden, few, calibration.seed, processes)
    if tokens is None:
        calibration.importance[disk.model] = {}
        return {}
    sums = GradientSquares(processes)
    for name in progress_bar(chain[::-1], desc="sensitivity", unit="block", progress=progress):
        first, part = name == chain[0], part_of(plan, name)
        if first and not part.linears:
            break
        with disk.loaded(name) as block, unfolded(disk.model, part) as each, ExitStack() as stack:
            stack.enter_context(frozen(block))
            stack.enter_context(torch.enable_grad())
            for p in each.linears:
                stack.callback(sums.watch(p.name, disk.model.get_submodule(p.name)))
            for i, gradient in enumerate(gradients):
                hidden = entered[name][i].detach().requires_grad_(not first)
                stream.calls[name][i](block, hidden).backward(gradient)
                if hidden.grad is not None:
                    gradients[i] = hidden.grad
        del entered[name]
    found = sums.mean(tokens)
    calibration.importance[disk.model] = dict(found)
    return found


def _pass_on(stream: Stream, block: nn.Module, name: str, left: Activations, batch: int) -> None:
    left.append(stream.forward(block, name, batch))


def _from_the_top(
    disk: OnDisk, returns: Returns, left: Activations, batches: Sequence[Batch], seed: int, processes: Processes
) -> tuple[list[Tensor], int | None]:
    """The gradient of the model's own loss at what leaves its last block, per batch; and how many tokens it sums over.

    None where the loss is not a number, in any process: see :func:`lowrank_ft.conversion.sensitivity.output_gradients`.
    """
    generator, tokens, gradients, wrong = torch.Generator().manual_seed(seed), 0, list[Tensor](), 0
    last = list(returns)[-1]
    with frozen(disk.model), torch.enable_grad():
        for i, batch in enumerate(batches):
            hidden = left[i].detach().requires_grad_()
            with stubs(disk.model, returns, {last: hidden}):
                loss, counted = own_loss(run(disk.model, batch), batch, generator, processes)
            loss.backward()
            assert hidden.grad is not None
            gradients.append(hidden.grad)
            tokens += counted
            wrong += not torch.isfinite(loss)
    return gradients, None if processes.total(wrong) else tokens
