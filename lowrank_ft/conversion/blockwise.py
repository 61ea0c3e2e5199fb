"""Factorize a model block by block, each linear fitted to what really reaches it in the converted model.

Along each chain of blocks run two streams of hidden states: those of the dense model and those of the model as
converted so far. Within a block the linears are taken in the order in which they run, and those that read the same
tensor (q/k/v, gate/up) share their moments. Then the block is refined against its dense twin, and both streams move
past it. In memory at any time: two streams, one block twice, and the moments of one block.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_ft.conversion.activations import Activations
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.chains import Batch, ChainInputs, block_of, capture, find_chains, run, siblings, token_mask
from lowrank_ft.conversion.moments import Moments
from lowrank_ft.conversion.record import ConversionRecord
from lowrank_ft.conversion.refine import factors_of, refine_block, squared_error
from lowrank_ft.factorization.solvers import regression_factors, truncated_svd
from lowrank_ft.nn.replace import dense_weight, factorized, swap

METHODS = ("svd", "activation", "anchored")


def convert_blocks(
    model: nn.Module,
    ranks: Mapping[str, int],
    calibration: Calibration,
    method: str,
    record: ConversionRecord | None = None,
    progress: bool = False,
) -> None:
    """Replace the linears named in ``ranks`` by factors, in place; a ``record`` is told what was lost where.

    Args:
        method: ``svd`` (the weight alone), ``activation`` (the dense model's inputs), or ``anchored`` (the dense
            model's outputs from the inputs of the model as converted so far).

    Raises:
        NonFiniteError: a weight or an activation holds NaN or infinity; the message names the linear.
        DivergedError: refinement failed.
    """
    batches = calibration.batches
    chains = find_chains(model, siblings(model, [b for n in ranks if (b := block_of(model, n))]), batches[0])
    chains = [c for c in chains if any(_within(n, b) for b in c for n in ranks)]
    members = {b: {n: r for n, r in ranks.items() if _within(n, b)} for c in chains for b in c}
    loose = {n: r for n, r in ranks.items() if not any(n in m for m in members.values())}
    inputs = [capture(model, chain, batches, calibration.store()) for chain in chains]
    _convert_loose(model, loose, calibration, method, record)

    bar = tqdm(total=len(members), desc="factorize", unit="block", disable=None if progress else True)
    for i, chain in enumerate(chains):
        dense = _Stream(inputs.pop(0), calibration)
        if i == 0 and not loose:  # up to here, the converted model is the dense one
            converted = copy.copy(dense)
        else:
            converted = _Stream(capture(model, chain, batches, calibration.store()), calibration)
        for name in chain:
            if members[name]:
                _Block(model, name, members[name], method, calibration).convert(dense, converted, record)
            else:
                unchanged = converted.hidden is dense.hidden
                dense.hidden = dense.after(model.get_submodule(name), name)
                converted.hidden = dense.hidden if unchanged else converted.after(model.get_submodule(name), name)
            bar.update()
    bar.close()


class _Stream:
    """Hidden states on their way through a chain, batch by batch."""

    def __init__(self, inputs: ChainInputs, calibration: Calibration) -> None:
        self.hidden, self.calls, self.calibration = inputs.hidden, inputs.calls, calibration

    def forward(self, block: nn.Module, name: str, batch: int) -> Tensor:
        return self.calls[name][batch](block, self.hidden[batch])

    @torch.no_grad()
    def after(self, block: nn.Module, name: str) -> Activations:
        """What leaves the block, which stands in the chain under ``name``."""
        left = self.calibration.store()
        for i in range(len(self.hidden)):
            left.append(self.forward(block, name, i))
        return left


class _Block:
    """One block on its way from dense to factored, beside a dense twin."""

    def __init__(
        self, model: nn.Module, name: str, ranks: Mapping[str, int], method: str, calibration: Calibration
    ) -> None:
        self.model, self.name, self.ranks, self.method, self.calibration = model, name, ranks, method, calibration
        self.block = model.get_submodule(name)
        self.twin = copy.deepcopy(self.block)

    def convert(self, dense: _Stream, converted: _Stream, record: ConversionRecord | None) -> None:
        """Convert the block, and move both streams past it."""
        moments: dict[str, Moments] = {}
        for group in self._groups(dense):
            shared = self._moments(group[0], dense, converted)
            for name in group:
                moments[name] = shared
                self._factorize(name, shared)
        for name in self.ranks:
            if name not in moments:  # none is wanted, or no token of the calibration data came by
                self._factorize(name, None)
        wanted, left = dense.after(self.twin, self.name), converted.after(self.block, self.name)
        batches = self.calibration.batches
        masks = [token_mask(b, x, "decoder" in self.name) for b, x in zip(batches, wanted, strict=True)]
        before = after = mean_error(left, wanted, masks)
        if self.calibration.refine_epochs > 0:
            left, after = self._refine(converted, wanted, masks, left, before)
        dense.hidden, converted.hidden = wanted, left
        if record is None:
            return
        record.add_block(self.name, before, after)
        for name, module in self._dense(self.ranks).items():
            inputs = moments[name].inputs if name in moments else None
            record.add_linear(name, dense_weight(module), self.model.get_submodule(name), inputs)

    def _refine(
        self, converted: _Stream, wanted: Activations, masks: Sequence[Tensor | None], left: Activations, error: float
    ) -> tuple[Activations, float]:
        """Refine the factors where that helps; what leaves the block then, and how far off it is."""
        start = [(p, p.detach().clone()) for p in factors_of(self.block)]
        settings = self.calibration
        refine_block(
            self.block, converted.hidden, converted.calls[self.name], wanted, masks, settings.refine_epochs,
            settings.refine_learning_rate, settings.seed,
        )  # fmt: skip
        refined = converted.after(self.block, self.name)
        if (refined_error := mean_error(refined, wanted, masks)) <= error:
            return refined, refined_error
        for parameter, value in start:  # nothing was left to gain, as at full rank
            parameter.data.copy_(value)
        return left, error

    def _dense(self, names: Iterable[str]) -> dict[str, nn.Module]:
        return {n: self.twin.get_submodule(n.removeprefix(f"{self.name}.")) for n in names}

    def _groups(self, dense: _Stream) -> list[list[str]]:
        groups: list[list[str]] = []
        missing = {} if self.method == "svd" else self._dense(self.ranks)
        for i in range(len(dense.hidden)):
            if not missing:
                break
            groups += input_groups(missing, partial(dense.forward, self.twin, self.name, i))
            missing = {n: m for n, m in missing.items() if not any(n in g for g in groups)}
        if missing:
            names = list(missing)
            warnings.warn(
                f"no calibration token reached {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}; "
                "factorized by plain SVD",
                stacklevel=2,
            )
        return groups

    def _moments(self, name: str, dense: _Stream, converted: _Stream) -> Moments:
        """Moments of the inputs of a linear that is still dense in the block under conversion."""
        twin, module = self._dense([name])[name], self.model.get_submodule(name)
        moments = Moments()
        for i, batch in enumerate(self.calibration.batches):
            x = here = input_of(twin, partial(dense.forward, self.twin, self.name, i))
            if self.method == "anchored":
                here = input_of(module, partial(converted.forward, self.block, self.name, i))
            if x is None or here is None:
                continue
            if here.dim() == 2 and len(here) != dense.hidden[i].shape[:-1].numel():
                x = here  # tokens that a router chose, which need not be the same in both models
            moments.add(here, x, token_mask(batch, here, "decoder" in name), name)
        return moments

    def _factorize(self, name: str, moments: Moments | None) -> None:
        factorize_linear(self.model, name, self.ranks[name], moments, self.method, self.calibration.damping)


def factorize_linear(
    model: nn.Module, name: str, rank: int, moments: Moments | None, method: str, damping: float
) -> None:
    """Replace one dense linear by factors that fit the moments of its inputs, or its weight where there are none."""
    dense = model.get_submodule(name)
    weight = dense_weight(dense)
    if moments is None or moments.inputs is None:
        factors = truncated_svd(weight, rank, f"{name}.weight")
    else:
        cross = moments.cross if method == "anchored" else None
        factors = regression_factors(weight, rank, moments.inputs, cross, damping, f"{name}.weight")
    swap(model, name, factorized(dense, factors))


def _convert_loose(
    model: nn.Module, ranks: Mapping[str, int], calibration: Calibration, method: str, record: ConversionRecord | None
) -> None:
    """Linears outside of any chain (a pooler, a block that runs several times): by the dense model's inputs."""
    moments = dense_moments(model, list(ranks), calibration.batches) if ranks and method != "svd" else {}
    for name, rank in ranks.items():
        weight, found = dense_weight(model.get_submodule(name)), moments.get(name)
        factorize_linear(model, name, rank, found, "activation", calibration.damping)
        if record is not None:
            record.add_linear(name, weight, model.get_submodule(name), found.inputs if found else None)


@torch.no_grad()
def dense_moments(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, Moments]:
    """Moments of the inputs of several linears at once, from runs of the whole model."""
    moments = {n: Moments() for n in names}
    for batch in batches:
        with ExitStack() as stack:
            for n in names:

                def note(module: nn.Module, args: Any, n: str = n, batch: Batch = batch) -> None:
                    moments[n].add(args[0], args[0], token_mask(batch, args[0], "decoder" in n), n)

                stack.callback(model.get_submodule(n).register_forward_pre_hook(note).remove)
            run(model, batch)
    return moments


@torch.no_grad()
def input_groups(linears: Mapping[str, nn.Module], forward: Callable[[], Any]) -> list[list[str]]:
    """Names of linears by the tensor that they read, in the order in which they run; who gets no token is left out."""
    groups: list[list[str]] = []
    seen: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        if name in seen or x.numel() == 0:
            return
        seen[name] = x
        for group in reversed(groups):
            other = seen[group[0]]
            if other is x or (other.shape == x.shape and torch.equal(other, x)):
                group.append(name)
                return
        groups.append([name])

    with ExitStack() as stack:
        for name, module in linears.items():
            handle = module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
            stack.callback(handle.remove)
        forward()
    return groups


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


def mean_error(found: Activations, wanted: Activations, masks: Sequence[Tensor | None]) -> float:
    """``|found - wanted| / |wanted|`` of hidden states, the mean over batches."""
    errors = [squared_error(a, b, m).sqrt().item() for a, b, m in zip(found, wanted, masks, strict=True)]
    return sum(errors) / len(errors)


def _within(name: str, block: str) -> bool:
    return name.startswith(f"{block}.")


class _Received(Exception):
    """Raised inside a hook: the rest of the forward pass is not needed."""
