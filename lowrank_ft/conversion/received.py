"""What the linears of a model receive: which of them read the same tensor, the tensors, and their moments."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.conversion.activations import Activations
from lowrank_ft.conversion.chains import Batch, run, token_mask
from lowrank_ft.conversion.moments import Moments
from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.nn.replace import dense_weight


class InputGroups:
    """Linears by the tensor that they read, in the order in which they run; who gets no token is left out.

    A linear that runs several times (ALBERT has one block for all layers) is in several groups. Those of different
    experts, or blocks, are in none together: what they receive may be the same here, and not elsewhere.
    """

    _LOOK_BACK = 8  # those that share a tensor run close to each other

    def __init__(self, stop_after: int | None = None) -> None:
        self.groups: list[tuple[list[str], Tensor]] = []
        self.calls = 0
        self._stop_after = stop_after

    def note(self, name: str, module: nn.Module, args: Any) -> None:
        """A hook before the forward pass of the linear ``name``; after ``stop_after`` calls it ends that pass."""
        x = args[0].detach()
        if x.numel() > 0:
            self._group_of(name, x).append(name)
            self.calls += 1
            if self.calls == self._stop_after:
                raise _Received

    def each_once(self, names: Sequence[str]) -> bool:
        """Whether each of these ran, and none of them twice."""
        return sorted(n for group, _ in self.groups for n in group) == sorted(names)

    def _group_of(self, name: str, x: Tensor) -> list[str]:
        for names, other in reversed(self.groups[-self._LOOK_BACK :]):
            if name in names or _numbers(names[0]) != _numbers(name):
                continue
            if other.shape == x.shape and (other.data_ptr() == x.data_ptr() or torch.equal(other, x)):
                return names
        self.groups.append(([], x))
        return self.groups[-1][0]


def _numbers(name: str) -> list[str]:
    """Of blocks and experts, in the name of a linear."""
    return [part for part in name.split(".") if part.isdigit()]


class Group:
    """Linears of a block that read the same tensor: its moments in the dense model, or where asked the tensor itself."""

    def __init__(self, names: list[str], inputs: Activations | None) -> None:
        self.names, self.moments = names, Moments()
        self._inputs, self._batches = inputs, list[int]()

    def note(self, i: int, batch: Batch, module: nn.Module, args: Any) -> None:
        self.add(i, batch, args[0])

    def add(self, i: int, batch: Batch, x: Tensor) -> None:
        if self._inputs is None:
            self.moments.add(x, None, token_mask(batch, x, "decoder" in self.names[0]), self.names[0])
        elif x.numel() > 0:
            self._inputs.append(x.detach())
            self._batches.append(i)

    def received(self) -> Iterator[tuple[int, Tensor]]:
        """The batches that reached it, by number, with the tensors."""
        return zip(self._batches, self._inputs or (), strict=True)

    def forget(self) -> None:
        """Let the tensors go: the inputs of a whole block are the largest thing in memory here."""
        self._inputs = None


def input_of(module: nn.Module, forward: Callable[[], Any]) -> Tensor | None:
    """The first tensor that ``module`` receives while ``forward`` runs, which ends there; None if it receives none."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: Any) -> None:
        found.append(args[0].detach())
        raise _Received

    handle = module.register_forward_pre_hook(note)
    try:
        with torch.no_grad(), suppress(_Received):
            forward()
    finally:
        handle.remove()
    return found[0] if found else None


@torch.no_grad()
def dense_moments(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    forward: Callable[[int], Any] | None = None,
    processes: Processes = ONE,
) -> dict[str, Moments]:
    """Moments of the inputs of several linears at once, from one run of the whole model per batch.

    Linears that read the same tensor share one object.

    Args:
        forward: runs what holds the linears on the batch of a number, to its end; None for the model, as far as needed.
        processes: each with its rows of every batch; the moments are those of all rows.
    """
    found: dict[str, Moments] = {}
    stop_after: int | None = None
    for i, batch in enumerate(batches):
        received = InputGroups(stop_after)
        with ExitStack() as stack:
            for n in names:
                stack.callback(model.get_submodule(n).register_forward_pre_hook(partial(received.note, n)).remove)
            with suppress(_Received):
                run(model, batch) if forward is None else forward(i)
        if i == 0 and forward is None and received.each_once(names):
            stop_after = len(names)  # what comes after the last of them, such as the output head, is not needed
        for group, x in received.groups:
            mask = token_mask(batch, x, "decoder" in group[0])
            for moments in {id(m): m for m in _moments_of(group, found)}.values():
                moments.add(x, None, mask, group[0])
    each = {n: found.get(n, Moments()) for n in names}
    return each if processes.count == 1 else _added_up(model, each, processes)


def _added_up(model: nn.Module, moments: dict[str, Moments], processes: Processes) -> dict[str, Moments]:
    """Over all processes, once for linears that share an object in the main process."""
    first: dict[int, str] = {}
    shared = processes.agreed({n: first.setdefault(id(m), n) for n, m in moments.items()})
    for name in dict.fromkeys(shared.values()):
        moments[name].add_up(processes, dense_weight(model.get_submodule(name)).shape[1])
    return {n: moments[shared[n]] for n in moments}


def _moments_of(group: Sequence[str], found: dict[str, Moments]) -> list[Moments]:
    """Those of the members of a group; members without any get new ones, which they share."""
    fresh = Moments()
    return [found.setdefault(n, fresh) for n in group]


class _Received(Exception):
    """Raised inside a hook: the rest of the forward pass is not needed."""
