"""Convert a model that is larger than memory: read, factorize and write one block after the other.

    before      the chain of blocks, what enters its first one, and where asked each linear's importance
    per block   read it, fit its factors as :mod:`lowrank_ft.conversion.blockwise` does, write them, let it go
    after       what is left (embeddings, norms, head) is copied

In memory are one dense block, the same block converted, and the hidden states of the calibration data (or none of
those, with ``activations_dir``). The factors are those that a conversion in memory makes, to the last bit in float32.
After each block the conversion is as good as stopped: what it needs to go on is in an :class:`Unfinished` folder.
Training of all factors together needs the whole model, so it is not done here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lowrank_ft.checkpoints.on_disk import OnDisk
from lowrank_ft.checkpoints.unfinished import Unfinished
from lowrank_ft.conversion.blockwise import Stream, convert_block, follows
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.chains import Batch, block_of, capture, find_chains, siblings
from lowrank_ft.conversion.record import ConversionRecord, LinearRecord
from lowrank_ft.conversion.stubs import Returns, returns_of, stubs
from lowrank_ft.errors import TargetError
from lowrank_ft.factorization.plan import Plan
from lowrank_ft.factorization.solvers import truncated_svd
from lowrank_ft.nn import LowRankLinear, lowrank_layers
from lowrank_ft.nn.forms import pivoted, swap
from lowrank_ft.nn.modes import evaluating
from lowrank_ft.nn.replace import dense_weight, factorized


def find_chain(disk: OnDisk, plan: Plan, batch: Batch) -> Returns:
    """The blocks that hold the planned linears, in their order, and how each returns.

    Reads the weights twice. Afterwards blocks have to be loaded before they are run.

    Raises:
        TargetError: they are no single chain, a linear is in none of them, or blocks hand on more than hidden states.
    """
    model, names = disk.model, [p.name for p in plan.linears]
    one = {k: v[:1] for k, v in batch.items()}
    blocks = [b for n in names if (b := block_of(model, n))]
    chains = find_chains(model, siblings(model, blocks), one)
    chains = [c for c in chains if any(n.startswith(f"{b}.") for b in c for n in names)]
    loose = [n for n in names if not any(n.startswith(f"{b}.") for c in chains for b in c)]
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


def members_of(chain: Returns, plan: Plan) -> dict[str, list[str]]:
    """The planned linears of each block."""
    return {b: [p.name for p in plan.linears if p.name.startswith(f"{b}.")] for b in chain}


@dataclass
class Streaming:
    """A conversion block by block, on its way.

    Attributes:
        disk: the dense model; in the end its factored linears are there, without weights.
        unfinished: where results are kept.
        dtype: of what is written; None for the one that is computed in.
        record: what was lost where.
    """

    disk: OnDisk
    unfinished: Unfinished
    dtype: torch.dtype | None
    record: ConversionRecord

    def truncate(self, plan: Plan, progress: bool = False) -> None:
        """Plain SVD of every planned linear; blocks need not be a chain."""
        units: dict[str, list[str]] = {}
        for name in plan.ranks:
            units.setdefault(block_of(self.disk.model, name) or name, []).append(name)
        for unit, names in self._left_to_do(units, progress):
            with self._written(unit, {}):
                for name in names:
                    dense: Any = self.disk.model.get_submodule(name)
                    layer = factorized(dense, truncated_svd(dense_weight(dense), plan.ranks[name], f"{name}.weight"))
                    self.record.add_linear(name, dense_weight(dense), layer, None)
                    swap(self.disk.model, name, layer)

    def fit(self, plan: Plan, returns: Returns, method: str, calibration: Calibration, progress: bool = False) -> None:
        """Fit the linears of a chain of blocks to calibration data.

        Args:
            returns: of the blocks, from :func:`find_chain`.
        """
        model, chain = self.disk.model, list(returns)
        batches = calibration.fitted_and_held_out if follows(method, calibration) else calibration.fitted
        with evaluating(model):
            with stubs(model, returns):
                inputs = capture(model, chain, batches, calibration.store())
            dense = Stream(inputs, calibration)
            converted = Stream(inputs, calibration) if follows(method, calibration) else None
            streams = {"dense": dense, **({} if converted is None else {"converted": converted})}
            for name, stream in streams.items():
                if (kept := self.unfinished.hidden(name)) is not None:
                    stream.hidden = calibration.store()
                    for x in kept:
                        stream.hidden.append(x.to(self.disk.device))
            for block, names in self._left_to_do(members_of(returns, plan), progress):
                ranks = {n: plan.ranks[n] for n in names if n in plan.ranks}
                with self._written(block, streams):
                    convert_block(model, block, ranks, dense, converted, method, calibration, self.record)

    def _left_to_do(self, units: Mapping[str, list[str]], progress: bool) -> Iterator[tuple[str, list[str]]]:
        """Those that were written before get their shape back, and the record what is known of them."""
        done = [u for u in units if self.unfinished.has(u)]
        for unit in done:
            self._remember(unit)
        left = [u for u in units if u not in done]
        for unit in tqdm(
            left, desc="factorize", unit="block", initial=len(done), total=len(units),
            disable=None if progress else True,
        ):  # fmt: skip
            yield unit, units[unit]

    @contextmanager
    def _written(self, unit: str, streams: Mapping[str, Stream]) -> Iterator[None]:
        """Inside, the unit is in memory, to be converted; then it is written, and what comes next can be taken up."""
        self.disk.load(unit)
        known = set(self.record.linears)
        blocks = len(self.record.blocks)
        yield
        layers = _store_pivoted(self.disk.model, unit, self.dtype)
        facts = {
            "layers": layers,
            "linears": {n: asdict(e) for n, e in self.record.linears.items() if n not in known},
            "blocks": [asdict(b) for b in self.record.blocks[blocks:]],
        }
        tensors = {
            f"{unit}.{k}": self._as_stored(v) for k, v in self.disk.model.get_submodule(unit).state_dict().items()
        }
        self.unfinished.add(unit, tensors, facts, {n: s.hidden for n, s in streams.items()})
        self.disk.unload(unit)

    def _as_stored(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor
        return tensor.detach().cpu().contiguous()

    def _remember(self, unit: str) -> None:
        facts = self.unfinished.facts(unit)
        self.disk.unhook(unit)
        for name, (rank, pivot) in facts["layers"].items():
            dense: Any = self.disk.model.get_submodule(name)
            layer = LowRankLinear.like(dense, rank, device="meta", pivot=pivot)
            swap(self.disk.model, name, layer.train(dense.training))
        self.record.linears |= {n: LinearRecord.from_dict(e) for n, e in facts["linears"].items()}
        for entry in facts["blocks"]:
            self.record.add_block(entry["name"], entry["error_before"], entry["error_after"])


def _store_pivoted(model: Any, unit: str, dtype: torch.dtype | None) -> dict[str, tuple[int, str | None]]:
    """Give the factors of a unit the form in which they are stored; rank and pivot of each."""
    module = model.get_submodule(unit)
    layers = {f"{unit}.{n}".rstrip("."): layer for n, layer in lowrank_layers(module)}
    for name, layer in layers.items():
        swap(model, name, pivoted(layer, dtype))
    return {n: (layer.rank, layer.pivot) for n, layer in ((n, model.get_submodule(n)) for n in layers)}
