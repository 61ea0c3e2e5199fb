"""What enters each block of a chain, without running the blocks.

A model is more than its blocks: embeddings, masks and positions come before them, a norm and a head after. To get at
those while no block is in memory, each block is replaced by a stub that hands its hidden states on. The other arguments
of the blocks are then the right ones, unless a block makes a part of them; that is checked on one batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.conversion.activations import Activations
from lowrank_ft.conversion.chains import Batch, Call, ChainInputs, capture
from lowrank_ft.errors import TargetError, first_line

_FEW = 2  # batches, for which looking at one first does not pay
Returns = Mapping[str, bool]
"""For each block, whether it returns a tuple, of which the hidden states are the first."""


def returns_of(model: nn.Module, chain: Sequence[str], batch: Batch) -> Returns:
    """How the blocks answer, from one run of the model; and that stubs can stand in for them.

    Raises:
        TargetError: a block hands on more than hidden states.
    """
    found: dict[str, bool] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = not isinstance(output, Tensor)

        return hook

    with ExitStack() as stack:
        for name in chain:
            stack.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        real = capture(model, chain, [batch], Activations()).calls
    # The run ends before the last block.
    returns = {name: found.get(name, next(iter(found.values()), False)) for name in chain}
    differences: Iterator[str]
    try:
        with stubs(model, returns):
            stubbed = capture(model, chain, [batch], Activations()).calls
        differences = (f"{d} of {n}" for n in chain if (d := _difference(real[n][0], stubbed[n][0])))
    except (ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:  # of a model that wants more
        differences = iter([first_line(error)])
    if (difference := next(differences, None)) is not None:
        raise TargetError(
            f"the blocks of this {type(model).__name__} hand on more than hidden states ({difference}), so none can be "
            "converted alone; convert the model without --stream, or with --method svd"
        )
    return returns


def capture_of_first(
    model: nn.Module, chain: Sequence[str], batches: Sequence[Batch], hidden: Activations
) -> ChainInputs:
    """:func:`capture` of the model's first chain, with stubs for its blocks where that gives the same."""
    if len(batches) > _FEW:
        try:
            returns = returns_of(model, chain, batches[0])
        except TargetError:
            return capture(model, chain, batches, hidden)
        with stubs(model, returns):
            return capture(model, chain, batches, hidden)
    return capture(model, chain, batches, hidden)


@contextmanager
def stubs(model: nn.Module, returns: Returns, last: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Inside, the blocks hand their hidden states on.

    Args:
        last: what single blocks return instead.
    """
    given = last or {}

    def stub(name: str) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = given[name] if name in given else args[0] if args else kwargs["hidden_states"]
            return (hidden,) if returns[name] else hidden

        return forward

    modules: dict[str, Any] = {name: model.get_submodule(name) for name in returns}
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = stub(name)
        yield
    finally:
        for name, module in modules.items():
            if before[name] is None:
                del module.forward
            else:
                module.forward = before[name]


def _difference(one: Call, other: Call) -> str | None:
    """The argument in which two calls of a block differ, or None."""
    if one.kwargs.keys() != other.kwargs.keys() or len(one.args) != len(other.args):
        return "an argument"
    for place, (a, b) in enumerate(zip(one.args, other.args, strict=True)):
        if not _same(a, b):
            return f"argument {place + 2}"
    return next((k for k in one.kwargs if not _same(one.kwargs[k], other.kwargs[k])), None)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return isinstance(b, tuple | list) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or a == b or (type(a) is type(b) and not isinstance(a, int | float | str | bool))
