"""Convert a model that is larger than memory: read, factorize and write one block after the other.

    before      the chain of blocks, what enters its first one, and where asked each linear's importance
    per block   read it, fit its factors as :mod:`lowrank_ft.conversion.blockwise` does, write them, let it go
    after       what is left (embeddings, norms, head) is copied

In memory are one dense block, the same block converted, and the hidden states of the calibration data (or none of
those, with ``activations_dir``). The factors are those that a conversion in memory makes, to the last bit in float32.
It can be interrupted after any block: what it needs to go on is in an :class:`Unfinished` folder.
Training of all factors together needs the whole model, so it is not done here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lowrank_ft.checkpoints.empty import put_layers
from lowrank_ft.checkpoints.on_disk import OnDisk
from lowrank_ft.checkpoints.unfinished import Unfinished
from lowrank_ft.console import progress_bar
from lowrank_ft.conversion.block_sensitivity import output_importance_on_disk
from lowrank_ft.conversion.blockwise import Stream, convert_block, follows, truncate_linears
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.chains import Batch, block_of, capture, chains_with
from lowrank_ft.conversion.experts import expert_counts, fold_records, one_by_one, part_of, stacks_of
from lowrank_ft.conversion.processes import ONE, Processes
from lowrank_ft.conversion.record import ConversionRecord, LinearRecord
from lowrank_ft.conversion.stubs import Returns, returns_of, stubs
from lowrank_ft.errors import TargetError
from lowrank_ft.factorization.plan import LinearPlan, Plan
from lowrank_ft.nn import LowRankLinear, stored_form, unfold_experts
from lowrank_ft.nn.forms import pivoted, store
from lowrank_ft.nn.modes import evaluating


def find_chain(disk: OnDisk, plan: Plan, batch: Batch) -> Returns:
    """The blocks that hold the planned linears, in their order, and how each returns.

    Reads the weights twice. Afterwards blocks have to be loaded before they are run.

    Raises:
        TargetError: they are no single chain, a linear is in none of them, or blocks hand on more than hidden states.
    """
    model = disk.model
    one = {k: v[:1] for k, v in batch.items()}
    chains, loose = chains_with(model, [p.name for p in plan.linears], one)
    why = None
    if len(chains) != 1:
        why = f"its blocks are {len(chains)} chains and not one"
    elif loose:
        why = f"{loose[0]} is in none of its repeated blocks"
    if why is not None:
        raise TargetError(
            f"a {type(model).__name__} cannot be calibrated block by block ({why}); convert it without --stream, or "
            "with --method svd"
        )
    returns = returns_of(model, chains[0], one)
    for name in returns:
        disk.unhook(name)
    return returns


@dataclass
class Streaming:
    """A conversion block by block, on its way.

    Attributes:
        disk: the dense model; in the end its factored linears are there, without weights.
        unfinished: where results are kept.
        dtype: of what is written; None for the one that is computed in.
        record: what was lost where.
        processes: who shares the work; each reads every block, and the main one writes.
    """

    disk: OnDisk
    unfinished: Unfinished
    dtype: torch.dtype | None
    record: ConversionRecord
    processes: Processes = ONE

    def truncate(self, plan: Plan, progress: bool = False) -> None:
        """Plain SVD of every planned linear; blocks need not be a chain."""
        units: dict[str, list[LinearPlan]] = {}
        for p in plan.linears:
            if p.rank is not None:
                units.setdefault(block_of(self.disk.model, p.name) or p.name, []).append(p)
        plans = {unit: replace(plan, linears=tuple(linears)) for unit, linears in units.items()}
        for unit, part in self._left_to_do(plans, progress):
            with self._written(unit, part, {}) as ranks:
                truncate_linears(self.disk.model, ranks, self.record, self.processes)
        self.record.linears = fold_records(self.record.linears, expert_counts(plan))

    def fit(self, plan: Plan, returns: Returns, method: str, calibration: Calibration, progress: bool = False) -> None:
        """Fit the linears of a chain of blocks to calibration data.

        Args:
            returns: of the blocks, from :func:`find_chain`.
        """
        model, blocks = self.disk.model, list(returns)
        batches = calibration.fitted_and_held_out if follows(method, calibration) else calibration.fitted
        with evaluating(model):
            importance = self.unfinished.tensors(
                "importance", lambda: output_importance_on_disk(self.disk, returns, plan, calibration, progress)
            )
            with stubs(model, returns):
                inputs = capture(model, blocks, batches, calibration.store())
            dense = Stream(inputs, calibration)
            converted = Stream(inputs, calibration) if follows(method, calibration) else None
            streams = {"dense": dense, **({} if converted is None else {"converted": converted})}
            for name, stream in streams.items():
                if (kept := self.unfinished.hidden(name)) is not None:
                    stream.hidden = calibration.store()
                    for x in kept:
                        stream.hidden.append(self.processes.rows({"x": x})["x"].to(self.disk.device))
            for block, part in self._left_to_do({b: part_of(plan, b) for b in blocks}, progress):
                with self._written(block, part, streams) as ranks:
                    convert_block(model, block, ranks, dense, converted, method, calibration, importance, self.record)
        self.record.linears = fold_records(self.record.linears, expert_counts(plan))

    def _left_to_do(self, units: Mapping[str, Plan], progress: bool) -> Iterator[tuple[str, Plan]]:
        """Those that were written before get their shape back, and the record what is known of them."""
        done = [u for u in units if self.unfinished.has(u)]
        self._remember(done)
        left = [u for u in units if u not in done]
        for unit in progress_bar(
            left, desc="factorize", unit="block", initial=len(done), total=len(units),
            progress=progress,
        ):  # fmt: skip
            yield unit, units[unit]

    @contextmanager
    def _written(self, unit: str, plan: Plan, streams: Mapping[str, Stream]) -> Iterator[dict[str, int]]:
        """Inside, the unit is in memory, to be converted; then it is written, and what comes next can be taken up.

        The ranks that are given out are those of single linears, of which a stack of experts is made up inside.
        """
        model = self.disk.model
        self.disk.load(unit)
        known, blocks = list(self.record.linears), len(self.record.blocks)
        unfold_experts(model.get_submodule(unit), [n.removeprefix(f"{unit}.") for n in stacks_of(plan)])
        ranks = one_by_one(plan).ranks
        yield ranks
        self.record.gather(self.processes, [*known, *ranks])
        hidden = {n: map(self.processes.whole, s.hidden) for n, s in streams.items()}
        if not self.processes.main:
            for _ in chain.from_iterable(hidden.values()):
                pass  # the main process keeps the rows of all
            self.disk.unload(unit)
            return
        module: Any = model.get_submodule(unit)
        if isinstance(module, LowRankLinear):  # a linear that is in no block
            model.set_submodule(unit, pivoted(module, self.dtype))
        else:
            store(module, "pivoted", self.dtype, {})
        module = model.get_submodule(unit)
        stored, pivots = stored_form(module)
        facts = {
            "ranks": {_full(unit, n): r for n, r in stored.items()},
            "pivots": {_full(unit, n): side for n, side in pivots.items()},
            "linears": {n: asdict(e) for n, e in self.record.linears.items() if n not in known},
            "blocks": [asdict(b) for b in self.record.blocks[blocks:]],
        }
        tensors = {f"{unit}.{k}": self._as_stored(v) for k, v in module.state_dict().items()}
        self.unfinished.add(unit, tensors, facts, hidden)
        self.disk.unload(unit)

    def _as_stored(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor
        return tensor.detach().cpu().contiguous()

    def _remember(self, units: Sequence[str]) -> None:
        entry: dict[str, dict[str, Any]] = {"ranks": {}, "pivots": {}}
        for unit in units:
            facts = self.unfinished.facts(unit)
            self.disk.unhook(unit)
            for key, known in entry.items():
                known |= facts[key]
            self.record.linears |= {n: LinearRecord.from_dict(e) for n, e in facts["linears"].items()}
            for block in facts["blocks"]:
                self.record.add_block(block["name"], block["error_before"], block["error_after"])
        if entry["ranks"]:
            put_layers(self.disk.model, entry)


def _full(unit: str, name: str) -> str:
    return f"{unit}.{name}" if name else unit
