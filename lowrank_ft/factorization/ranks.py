"""Arithmetic of ranks: what a factorization costs, and which rank a budget buys.

A linear of shape ``(out, in)`` has ``out * in`` parameters. Factored at rank ``r`` it is stored and run with
``r * (out + in - r)`` (:mod:`lowrank_ft.factorization.pivoting`), which is less at every rank below full rank. While it
is trained, as balanced ``U`` and ``V``, it has ``r * (out + in)``. Each number is one multiply-add per token.
"""

import math
from collections.abc import Sequence

from lowrank_ft.errors import RankError

Shape = tuple[int, int]
"""``(out_features, in_features)``"""

RANK_MULTIPLE = 8
"""What ranks are multiples of where nobody says otherwise: tensor cores and grouped kernels want that."""


def dense_parameters(shape: Shape) -> int:
    return shape[0] * shape[1]


def factored_parameters(shape: Shape, rank: int) -> int:
    """As a compact checkpoint stores it, and runs it."""
    return rank * (shape[0] + shape[1] - rank)


def trained_parameters(shape: Shape, rank: int) -> int:
    """Of ``U (out, rank)`` and ``V (rank, in)``, the form in which factors are trained."""
    return rank * (shape[0] + shape[1])


def rank_at(shape: Shape, param_ratio: float) -> float:
    """The rank, seldom whole, at which the factored form has this share of the dense parameters."""
    total = shape[0] + shape[1]
    return (total - math.sqrt(max(0.0, total * total - 4 * param_ratio * dense_parameters(shape)))) / 2


def resolve_rank(rank: int | float, shape: Shape, name: str) -> int:
    """Turn a rank (int) or a fraction of full rank (float in (0, 1]) into a checked rank for one linear.

    Raises:
        RankError: not positive, a fraction above 1, or above ``min(out, in)``.
    """
    full = min(shape)
    if isinstance(rank, bool) or not isinstance(rank, int | float) or not math.isfinite(rank):
        raise RankError(f"rank {rank!r} for {name} is not a number; give an int, or a fraction of full rank in (0, 1]")
    if rank <= 0:
        raise RankError(f"rank {rank} for {name} is not positive; ranks are 1 to {full} for shape {shape}")
    if isinstance(rank, float):
        if rank > 1:
            raise RankError(f"fraction {rank} for {name} is above 1; give a fraction of full rank in (0, 1], or an int")
        return max(1, round(rank * full))
    if rank > full:
        raise RankError(
            f"rank {rank} exceeds min(out_features, in_features)={full} for {name} {shape}; give a lower rank"
        )
    return rank


def check_fraction(what: str, value: float) -> None:
    """Raise a RankError unless ``0 < value <= 1``."""
    if not 0 < value <= 1:
        hint = f" (did you mean {value / 100:g}?)" if 1 < value <= 100 else ""
        raise RankError(f"{what} {value} is out of range; it must be above 0 and at most 1{hint}")


def ranks_for_param_ratio(
    shapes: Sequence[Shape], param_ratio: float, multiple: int = RANK_MULTIPLE, copies: Sequence[int] | None = None
) -> list[int]:
    """Ranks that spend the same share of parameters on every linear, within one global budget.

    Each rank is :func:`rank_at` of the ratio, rounded down to a multiple of ``multiple`` (tensor cores and grouped kernels
    want multiples of 8; a matrix too narrow for that gets a smaller multiple). What the rounding left over is then spent
    one multiple at a time, on the linears that lost the largest share of their rank first.

    Args:
        copies: how many matrices of each shape get the same rank (the experts of a stack); 1 of each by default.

    Returns:
        One rank per shape, each at least 1; their total is at most ``param_ratio`` of the dense parameters.

    Raises:
        RankError: ``param_ratio`` is not in (0, 1], or below what rank 1 everywhere needs.
    """
    check_fraction("param ratio", param_ratio)
    copies = copies or [1] * len(shapes)
    total = sum(n * dense_parameters(s) for s, n in zip(shapes, copies, strict=True))
    least = sum(n * factored_parameters(s, 1) for s, n in zip(shapes, copies, strict=True))
    budget = math.floor(param_ratio * total + 1e-9)
    if least > budget:
        raise RankError(
            f"param ratio {param_ratio} keeps {budget:,} of {total:,} parameters, and rank 1 in all {len(shapes)} linears "
            f"needs {least:,}; the smallest feasible ratio is {math.ceil(least / total * 1e4) / 1e4:g}"
        )
    ideal = [rank_at(s, param_ratio) for s in shapes]
    steps = [rank_step(s, param_ratio, multiple) for s in shapes]
    ranks = [max(1, int(i / s + 1e-9) * s) for i, s in zip(ideal, steps, strict=True)]
    left = budget - sum(n * factored_parameters(s, r) for s, r, n in zip(shapes, ranks, copies, strict=True))
    by_loss = sorted(range(len(shapes)), key=lambda i: (ranks[i] - ideal[i]) / ideal[i])
    for i in by_loss:
        price = factored_parameters(shapes[i], ranks[i] + steps[i]) - factored_parameters(shapes[i], ranks[i])
        price *= copies[i]
        if ranks[i] < ideal[i] and price <= left and ranks[i] + steps[i] <= min(shapes[i]):
            ranks[i] += steps[i]
            left -= price
    return ranks


def rank_step(shape: Shape, param_ratio: float, multiple: int = RANK_MULTIPLE) -> int:
    """What ranks are multiples of: ``multiple``, or less where that is more than a quarter of the rank.

    A coarser grid would distort a small matrix more than alignment gains.
    """
    return max(1, min(multiple, 2 ** int(math.log2(max(1.0, rank_at(shape, param_ratio) / 4)))))


def rank_for_energy(singular_values: Sequence[float], energy: float) -> int:
    """The smallest rank whose singular values hold at least ``energy`` of the sum of squares.

    Raises:
        RankError: ``energy`` is not in (0, 1].
    """
    check_fraction("energy", energy)
    squares = [s * s for s in singular_values]
    total = math.fsum(squares)
    kept = 0.0
    for rank, square in enumerate(squares, start=1):
        kept += square
        if kept >= energy * total * (1 - 1e-12):
            return rank
    return len(squares)
