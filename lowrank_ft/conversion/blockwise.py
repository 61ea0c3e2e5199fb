"""Factorize a model block by block: each linear is fitted to what reaches it, and to what its outputs are worth.

Along each chain of blocks run two streams of hidden states: those of the dense model and, where the method or
refinement asks for it, those of the model as converted so far. Within a block the linears are taken in the order in
which they run, and those that read the same tensor (q/k/v, gate/up) share their moments. Then the block may be refined
against its dense twin, and the streams move past it. In memory at any time: the streams, one block twice, the moments of
one block, and for ``anchored`` what the linears of one dense block receive.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_ft.console import progress_bar
from lowrank_ft.conversion.activations import Activations
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.chains import ChainInputs, capture, chains_with, token_mask, within
from lowrank_ft.conversion.experts import expert_damping, is_expert, too_few, warn_of_few
from lowrank_ft.conversion.factor_trainer import factors_of, vectors_of
from lowrank_ft.conversion.moments import Moments
from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.conversion.received import Group, InputGroups, dense_moments, input_of
from lowrank_ft.conversion.record import ConversionRecord
from lowrank_ft.conversion.refine import refine_block, squares
from lowrank_ft.conversion.sensitivity import output_importance
from lowrank_ft.conversion.stubs import capture_of_first
from lowrank_ft.factorization.solvers import Factors, Regression, truncated_svd
from lowrank_ft.memory import give_back
from lowrank_ft.nn.replace import dense_weight, factorized

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
    batches = calibration.fitted_and_held_out if follows(method, calibration) else calibration.fitted
    chains, outside = chains_with(model, list(ranks), batches[0])
    members = {b: {n: r for n, r in ranks.items() if within(n, b)} for c in chains for b in c}
    loose = {n: ranks[n] for n in outside}
    inputs = [
        (capture if i else capture_of_first)(model, chain, batches, calibration.store())
        for i, chain in enumerate(chains)
    ]
    importance = {} if method == "svd" else output_importance(model, list(ranks), calibration, progress)
    _convert_loose(model, loose, calibration, method, importance, record)

    bar = progress_bar(total=len(members), desc="factorize", unit="block", progress=progress)
    for i, chain in enumerate(chains):
        dense = Stream(inputs.pop(0), calibration)
        converted: Stream | None = None
        if not follows(method, calibration):
            pass
        elif i == 0 and not loose:  # up to here, the converted model is the dense one
            converted = copy.copy(dense)
        else:
            converted = Stream(capture(model, chain, batches, calibration.store()), calibration)
        for name in chain:
            convert_block(model, name, members[name], dense, converted, method, calibration, importance, record)
            give_back()
            bar.update()
    bar.close()


def convert_block(
    model: nn.Module,
    name: str,
    ranks: Mapping[str, int],
    dense: "Stream",
    converted: "Stream | None",
    method: str,
    calibration: Calibration,
    importance: Mapping[str, Tensor],
    record: ConversionRecord | None,
) -> None:
    """Factorize the linears of the block ``name``, if any, and move the streams past it.

    Args:
        importance: of the outputs of linears, by name, where it is known.
    """
    if ranks:
        _Block(model, name, ranks, method, calibration, importance).convert(dense, converted, record)
        return
    block = model.get_submodule(name)
    unchanged = converted is not None and converted.hidden is dense.hidden
    dense.hidden = dense.after(block, name)
    if converted is not None:
        converted.hidden = dense.hidden if unchanged else converted.after(block, name)


def follows(method: str, calibration: Calibration) -> bool:
    """Whether anything looks at the hidden states of the converted model."""
    return method == "anchored" or calibration.refine_epochs > 0


class Stream:
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
        self,
        model: nn.Module,
        name: str,
        ranks: Mapping[str, int],
        method: str,
        calibration: Calibration,
        importance: Mapping[str, Tensor],
    ) -> None:
        self.model, self.name, self.ranks, self.method, self.calibration = model, name, ranks, method, calibration
        self.importance = importance
        self.block = model.get_submodule(name)
        self.twin = copy.deepcopy(self.block)

    def convert(self, dense: Stream, converted: Stream | None, record: ConversionRecord | None) -> None:
        """Convert the block, and move the streams past it."""
        seen, wanted = self._look(dense)
        moments: dict[str, Moments] = {}
        few: dict[str, int] = {}
        processes = self.calibration.processes
        for group in seen:
            first, damping = group.names[0], self.calibration.damping
            anchored = converted is not None and self._is_anchored(first)
            shared = self._moments(group, converted) if anchored and converted is not None else group.moments
            shared.add_up(processes, dense_weight(self.model.get_submodule(first)).shape[1])
            solver: Regression | None = None
            if is_expert(self.model, first):
                damping = expert_damping(shared, damping)
                few |= dict.fromkeys(group.names, shared.tokens) if too_few(shared) else {}
            if first not in few:
                solver = Regression(shared.inputs, shared.cross, damping, first)
            moments |= dict.fromkeys(group.names, shared)
            factorize_linears(self.model, {n: self.ranks[n] for n in group.names}, solver, processes, self.importance)
            give_back()
        if few:
            warn_of_few(list(few), self.name, max(few.values()))
        # Of the others, none is wanted, or no token of the calibration data came by.
        factorize_linears(self.model, {n: r for n, r in self.ranks.items() if n not in moments}, None, processes)
        dense.hidden = wanted
        if converted is not None:
            self._follow(converted, wanted, record)
        if record is None:
            return
        dense_modules = self._dense(self.ranks)
        for name in list(self.ranks)[processes.rank :: processes.count]:
            inputs = moments[name].inputs if name in moments else None
            record.add_linear(name, dense_weight(dense_modules[name]), self.model.get_submodule(name), inputs)

    def _follow(self, converted: Stream, wanted: Activations, record: ConversionRecord | None) -> None:
        """Refine the factors, and move the converted stream past the block."""
        left = converted.after(self.block, self.name)
        batches = self.calibration.fitted_and_held_out
        masks = [token_mask(b, x, "decoder" in self.name) for b, x in zip(batches, wanted, strict=True)]
        before = after = self._error(left, wanted, masks)
        if self.calibration.refine_epochs > 0:
            left, after = self._refine(converted, wanted, masks, left, before)
        converted.hidden = left
        if record is not None:
            record.add_block(self.name, before, after)

    def _error(self, found: Activations, wanted: Activations, masks: Sequence[Tensor | None]) -> float:
        """On the held-out batches where there are any."""
        start = len(self.calibration.fitted) if self.calibration.held_out else 0
        return mean_error(found, wanted, masks, start, self.calibration.processes)

    def _refine(
        self, converted: Stream, wanted: Activations, masks: Sequence[Tensor | None], left: Activations, error: float
    ) -> tuple[Activations, float]:
        """Refine the block where that helps; what leaves it then, and how far off it is."""
        settings = self.calibration
        vectors = vectors_of([self.block]) if settings.train_vectors else []
        start = [(p, p.detach().clone()) for p in (*factors_of(self.block), *vectors)]
        refine_block(
            self.block, converted.hidden, converted.calls[self.name], wanted, masks, settings.refine_epochs,
            settings.refine_learning_rate, settings.seed, len(settings.fitted), vectors, settings.processes,
        )  # fmt: skip
        refined = converted.after(self.block, self.name)
        if (refined_error := self._error(refined, wanted, masks)) <= error:
            return refined, refined_error
        for parameter, value in start:  # nothing was left to gain, as at full rank
            parameter.data.copy_(value)
        return left, error

    def _is_anchored(self, name: str) -> bool:
        """Whether a linear is fitted to what it receives in both models, to which a router may send other tokens."""
        return self.method == "anchored" and not is_expert(self.model, name)

    def _dense(self, names: Iterable[str]) -> dict[str, nn.Module]:
        return {n: self.twin.get_submodule(n.removeprefix(f"{self.name}.")) for n in names}

    @torch.no_grad()
    def _look(self, dense: Stream) -> tuple[list["Group"], Activations]:
        """Run the dense block once over all batches: what its linears receive, group by group, and what leaves it."""
        groups: list[Group] = []
        missing = {} if self.method == "svd" else self._dense(self.ranks)
        left = self.calibration.store()
        batches = self.calibration.fitted_and_held_out[: len(dense.hidden)]
        count = len(self.calibration.fitted)
        for i, batch in enumerate(batches):
            fitted = i < count
            with ExitStack() as stack:
                for group in groups if fitted else []:
                    module = self._dense(group.names[:1])[group.names[0]]
                    stack.callback(module.register_forward_pre_hook(partial(group.note, i, batch)).remove)
                received = InputGroups()
                for name, module in missing.items() if fitted else []:
                    stack.callback(module.register_forward_pre_hook(partial(received.note, name)).remove)
                left.append(dense.forward(self.twin, self.name, i))
            for names, x in received.groups:
                if new := [n for n in names if n in missing]:
                    groups.append(Group(new, self.calibration.store() if self._is_anchored(new[0]) else None))
                    groups[-1].add(i, batch, x)
                    missing = {n: m for n, m in missing.items() if n not in new}
                for group in groups:  # DeBERTa's linears read positions, too, after the hidden states
                    if group.names[0] in names and group.names[0] not in new:
                        group.add(i, batch, x)
        groups = self._of_all(groups)
        missing = {n: m for n, m in missing.items() if not any(n in g.names for g in groups)}
        if missing:
            names = list(missing)
            warnings.warn(
                f"no calibration token reached {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}; "
                "factorized by plain SVD",
                stacklevel=2,
            )
        return groups, left

    def _of_all(self, groups: list[Group]) -> list[Group]:
        """The same groups in the same order in all processes, also those of which no token came by here."""
        processes = self.calibration.processes
        if processes.count == 1:
            return groups
        mine = {n: g for g in groups for n in g.names}
        found: dict[str, Group] = {}
        for names in (names for each in processes.collect([g.names for g in groups]) for names in each):
            if new := [n for n in names if n not in found]:
                group = Group(new, self.calibration.store() if self._is_anchored(new[0]) else None)
                if new[0] in mine:
                    group = mine[new[0]]
                    group.names = new
                found |= dict.fromkeys(new, group)
        return list(dict.fromkeys(found.values()))

    def _moments(self, group: "Group", converted: Stream) -> Moments:
        """Moments of the inputs of linears that are still dense in the block under conversion."""
        name, batches = group.names[0], self.calibration.fitted
        module, moments = self.model.get_submodule(name), Moments()
        for i, x in group.received():
            here = input_of(module, partial(converted.forward, self.block, self.name, i))
            if here is None:
                continue
            if here.dim() == 2 and len(here) != converted.hidden[i].shape[:-1].numel():
                x = here  # tokens that a router chose, which need not be the same in both models
            moments.add(here, x, token_mask(batches[i], here, "decoder" in name), name)
        group.forget()
        return moments


def factorize_linears(
    model: nn.Module,
    ranks: Mapping[str, int],
    solver: Regression | None,
    processes: Processes = ONE,
    importance: Mapping[str, Tensor] | None = None,
) -> None:
    """Replace dense linears by factors that fit their inputs, or their weights alone where there is no ``solver``."""

    def work(name: str) -> Factors:
        weight, title = dense_weight(model.get_submodule(name)), f"{name}.weight"
        if solver is None:
            return truncated_svd(weight, ranks[name], title)
        return solver(weight, ranks[name], title, (importance or {}).get(name))

    for _ in _replaced(model, list(ranks), work, processes):
        pass


def truncate_linears(
    model: nn.Module,
    ranks: Mapping[str, int],
    record: ConversionRecord | None,
    processes: Processes = ONE,
    progress: bool = False,
) -> None:
    """Replace dense linears by factors of their weights alone; a ``record`` is told what each loses."""

    def work(name: str) -> Factors:
        dense = model.get_submodule(name)
        factors = truncated_svd(dense_weight(dense), ranks[name], f"{name}.weight")
        if record is not None:
            record.add_linear(name, dense_weight(dense), factorized(dense, factors), None)
        return factors

    bar = progress_bar(total=len(ranks), desc="factorize", unit="linear", progress=progress)
    for _ in _replaced(model, list(ranks), work, processes):
        bar.update()
    bar.close()


def _replaced(
    model: nn.Module, names: Sequence[str], work: Callable[[str], Factors], processes: Processes
) -> Iterator[str]:
    """The names, one by one, each once the factors that ``work`` gives are in the place of its linear."""
    for name, factors in processes.deal(names, work):
        model.set_submodule(name, factorized(model.get_submodule(name), Factors(*factors)))
        yield name


def _convert_loose(
    model: nn.Module,
    ranks: Mapping[str, int],
    calibration: Calibration,
    method: str,
    importance: Mapping[str, Tensor],
    record: ConversionRecord | None,
) -> None:
    """Linears outside of any chain (a pooler, a block that runs several times): by the dense model's inputs."""
    moments: dict[str, Moments] = {}
    if ranks and method != "svd":
        moments = dense_moments(model, list(ranks), calibration.fitted, processes=calibration.processes)
    for name, rank in ranks.items():
        weight, found = dense_weight(model.get_submodule(name)), moments.get(name, Moments())
        solver = Regression(found.inputs, None, calibration.damping, name)
        factorize_linears(model, {name: rank}, solver, calibration.processes, importance)
        if record is not None:
            record.add_linear(name, weight, model.get_submodule(name), found.inputs)


def mean_error(
    found: Activations,
    wanted: Activations,
    masks: Sequence[Tensor | None],
    start: int = 0,
    processes: Processes = ONE,
) -> float:
    """``|found - wanted| / |wanted|`` of hidden states, the mean over the batches from ``start`` on."""
    sums = torch.stack([torch.stack(squares(found[i], wanted[i], masks[i])) for i in range(start, len(found))])
    processes.add_up(sums)
    return (sums[:, 0] / sums[:, 1]).sqrt().mean().item()
