"""Which parts of a checkpoint make one of vLLM's linears, and which part of each this process holds.

vLLM packs linears that read the same input: its ``qkv_proj`` is ``q_proj``, ``k_proj`` and ``v_proj``. In a compact
checkpoint each of the three is dense or has a rank and a form of its own. A :class:`Piece` says for one of them what is
stored, and which of its outputs and inputs are this process's. Pure arithmetic: no vLLM, no tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowrank_ft.errors import CheckpointError

Span = tuple[int, int]  # first, and how many


@dataclass(frozen=True)
class Piece:
    """One linear of the checkpoint inside one of vLLM's.

    Attributes:
        name: what the checkpoint calls it.
        shape: ``(out, in)`` of the whole linear.
        rows: of its outputs, those that this process computes.
        columns: of its inputs, those that this process gets.
        rank: None where it is dense.
        pivot: the stored form: ``output``, ``input``, or None for plain factors.
    """

    name: str
    shape: tuple[int, int]
    rows: tuple[Span, ...]
    columns: Span
    rank: int | None = None
    pivot: str | None = None

    @property
    def local_shape(self) -> tuple[int, int]:
        return sum(length for _, length in self.rows), self.columns[1]

    @property
    def local_pivot(self) -> str | None:
        """The form here: a side that is split over processes cannot hold the identity, so its factors become plain."""
        split = {"output": self.local_shape[0] < self.shape[0], "input": self.local_shape[1] < self.shape[1]}
        return None if self.pivot is None or split[self.pivot] else self.pivot

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Part of the checkpoint, such as ``U``, to its shape."""
        return _shapes(self.shape, self.rank, self.pivot)

    def local_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same for what this process holds."""
        return _shapes(self.local_shape, self.rank, self.local_pivot)


def _shapes(shape: tuple[int, int], rank: int | None, pivot: str | None) -> dict[str, tuple[int, ...]]:
    rows, columns = shape
    if rank is None:
        return {"weight": shape}
    shapes: dict[str, tuple[int, ...]] = {
        "U": (rows - rank if pivot == "output" else rows, rank),
        "V": (rank, columns - rank if pivot == "input" else columns),
    }
    if pivot is not None:
        shapes["order"] = (rows if pivot == "output" else columns,)
    return shapes


@dataclass(frozen=True)
class Split:
    """How one of vLLM's linears is spread over processes.

    Attributes:
        outputs: of each packed part, how many outputs this process computes.
        inputs: how many inputs it gets.
        all_inputs: how many there are.
        size: over how many processes the outputs are split; 1 where they are whole.
        rank: which of them this one is.
        replicas: of each packed part, how many processes share the same outputs, as those of few key-value heads.
    """

    outputs: tuple[int, ...]
    inputs: int
    all_inputs: int
    size: int = 1
    rank: int = 0
    input_rank: int = 0
    replicas: tuple[int, ...] = ()

    def spans(self) -> list[tuple[int, Span]]:
        """Of each packed part: how many outputs it has in all, and which are here."""
        replicas = self.replicas or (1,) * len(self.outputs)
        return [
            (n * self.size // copies, (self.rank // copies * n, n))
            for n, copies in zip(self.outputs, replicas, strict=True)
        ]

    @property
    def columns(self) -> Span:
        return self.input_rank * self.inputs, self.inputs


def part_names(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """The checkpoint's names of what vLLM packs into ``prefix``; ``prefix`` itself where it packs nothing."""
    stem, dot, leaf = prefix.rpartition(".")
    return [f"{stem}{dot}{part}" for part in packed.get(leaf, [leaf])]


def plan_layer(
    prefix: str, ranks: Mapping[str, int], pivots: Mapping[str, str], packed: Mapping[str, Sequence[str]], split: Split
) -> list[Piece] | None:
    """The pieces of the linear ``prefix``, in the order of its outputs; None where all of it is dense.

    Args:
        ranks: of the checkpoint, every factored linear.
        pivots: of the checkpoint, the side of those that are pivoted.
        packed: leaf name to the leaf names that vLLM packs into it.

    Raises:
        CheckpointError: ranks contradict each other, the shapes, or what vLLM packs.
    """
    names, spans = part_names(prefix, packed), split.spans()
    factored = [n for n in dict.fromkeys([prefix, *names]) if n in ranks]
    if not factored:
        return None
    if prefix in ranks:  # the checkpoint packs them, too: one pair of factors for all
        if len(factored) > 1:
            raise CheckpointError(f"config.json has ranks for {prefix} and for {factored[1]}, a part of it; keep one")
        starts = [sum(total for total, _ in spans[:i]) for i in range(len(spans))]
        rows = tuple((start + first, n) for start, (_, (first, n)) in zip(starts, spans, strict=True))
        total = sum(total for total, _ in spans)
        # Neighbours are one span, so that a whole linear is recognized as such.
        rows = ((0, total),) if sum(n for _, n in rows) == total else rows
        return [_piece(prefix, (total, split.all_inputs), rows, split, ranks, pivots)]
    if len(names) != len(spans):
        raise CheckpointError(
            f"{prefix} has {len(spans)} parts in this vLLM, and its model class names {len(names)} ({', '.join(names)}); "
            "serve the dense checkpoint that lowrank-ft merge writes"
        )
    return [
        _piece(name, (total, split.all_inputs), (span,), split, ranks, pivots)
        for name, (total, span) in zip(names, spans, strict=True)
    ]


def _piece(
    name: str,
    shape: tuple[int, int],
    rows: tuple[Span, ...],
    split: Split,
    ranks: Mapping[str, int],
    pivots: Mapping[str, str],
) -> Piece:
    rank, pivot = ranks.get(name), pivots.get(name)
    longest = {None: min(shape), "output": shape[0] - 1, "input": shape[1] - 1}
    if rank is not None and (pivot not in longest or not 1 <= rank <= min(longest[pivot], min(shape))):
        raise CheckpointError(
            f"config.json says rank {rank} and pivot {pivot} for {name}, which is {shape[0]} x {shape[1]}; "
            "convert the model again"
        )
    return Piece(name, shape, rows, split.columns, rank, pivot if rank is not None else None)
