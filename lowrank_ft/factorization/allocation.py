"""Spend one parameter budget where it buys the most.

Every linear ``l`` offers ranks ``r`` at a price of ``r * (out + in - r)`` parameters, and what is lost at that rank is
the tail ``sum over i > r of s_i^2`` of its (weighted) spectrum; staying dense costs ``out * in`` and loses nothing.

    minimize   sum of losses over all linears      such that   sum of prices <= budget

A Lagrange multiplier, the price of one more parameter, is the same everywhere and found by bisection. It reaches those
offers alone that lie on the lower convex hull of a linear's losses over prices, and prices are concave in the rank. So
what is left of the budget then goes to the best of all remaining offers, one at a time.
"""

from collections.abc import Sequence

import numpy as np

from lowrank_ft.errors import RankError
from lowrank_ft.factorization.ranks import RANK_MULTIPLE, Shape, dense_parameters, factored_parameters, rank_step

ALLOCATIONS = ("uniform", "energy", "loss")


def allocate_ranks(
    shapes: Sequence[Shape],
    squared_spectra: Sequence[np.ndarray],
    budget: int,
    param_ratio: float,
    multiple: int = RANK_MULTIPLE,
    copies: Sequence[int] | None = None,
) -> list[int | None]:
    """Ranks that lose the least within ``budget`` parameters.

    Args:
        shapes: ``(out_features, in_features)`` of each linear.
        squared_spectra: for each, ``s_i^2 (min(out, in),)``, descending, in units of loss that can be compared.
        budget: parameters of all these linears together.
        param_ratio: of the budget, which sets how fine the ranks are (see :func:`rank_step`).
        multiple: ranks are multiples of it, where the matrix is wide enough.
        copies: how many matrices of each shape get the same rank (the experts of a stack, whose spectra are added up);
            1 of each by default.

    Returns:
        One rank per linear; None where it stays dense.

    Raises:
        RankError: even the smallest ranks do not fit; the message names the smallest ratio that does.
    """
    copies = copies or [1] * len(shapes)
    offers = [
        _Offers.of(s, q, rank_step(s, param_ratio, multiple), n)
        for s, q, n in zip(shapes, squared_spectra, copies, strict=True)
    ]
    cheapest = sum(int(o.prices[0]) for o in offers)
    total = sum(n * dense_parameters(s) for s, n in zip(shapes, copies, strict=True))
    if cheapest > budget:
        raise RankError(
            f"a budget of {budget:,} parameters is below the {cheapest:,} that the smallest ranks need; "
            f"the smallest feasible param ratio is {np.ceil(cheapest / total * 1e4) / 1e4:g}"
        )
    low, high = 0.0, max(float(o.losses[0]) for o in offers) or 1.0
    chosen = [0] * len(offers)
    for _ in range(100):
        price = (low + high) / 2 if low else high / 2
        trial = [o.best(price) for o in offers]
        if sum(int(o.prices[i]) for o, i in zip(offers, trial, strict=True)) <= budget:
            chosen, high = trial, price
        else:
            low = price
        if high - low <= 1e-12 * high:
            break
    _spend_rest(offers, chosen, budget)
    return [o.ranks[i] for o, i in zip(offers, chosen, strict=True)]


class _Offers:
    """What one linear can have: ranks, their prices in parameters, and what is lost at each."""

    def __init__(self, ranks: list[int | None], prices: np.ndarray, losses: np.ndarray) -> None:
        self.ranks, self.prices, self.losses = ranks, prices, losses

    @classmethod
    def of(cls, shape: Shape, squares: np.ndarray, step: int, copies: int = 1) -> "_Offers":
        ranks: list[int | None] = [*range(step, min(shape), step)]
        tails = np.concatenate([np.cumsum(np.asarray(squares, dtype=np.float64)[::-1])[::-1], [0.0]])
        prices = [factored_parameters(shape, r) for r in ranks if r is not None]
        losses = [float(tails[min(r, len(tails) - 1)]) for r in ranks if r is not None]
        return cls([*ranks, None], copies * np.array([*prices, dense_parameters(shape)]), np.array([*losses, 0.0]))

    def best(self, price: float) -> int:
        return int(np.argmin(self.losses + price * self.prices))

    def best_next(self, chosen: int, left: int) -> tuple[float, int]:
        """Of the offers above ``chosen`` for at most ``left`` more: the largest gain per parameter, and which."""
        costs = self.prices[chosen + 1 :] - self.prices[chosen]
        costs = costs[: np.searchsorted(costs, left, side="right")]
        if len(costs) == 0:
            return 0.0, chosen
        gains = (self.losses[chosen] - self.losses[chosen + 1 : chosen + 1 + len(costs)]) / costs
        best = int(np.argmax(gains))
        return float(gains[best]), chosen + 1 + best


def _spend_rest(offers: Sequence[_Offers], chosen: list[int], budget: int) -> None:
    """Improve ``chosen`` in place, the best gain per parameter first, while anything affordable gains."""
    left = budget - sum(int(o.prices[i]) for o, i in zip(offers, chosen, strict=True))
    while True:
        gains = [o.best_next(i, left) for o, i in zip(offers, chosen, strict=True)]
        k = max(range(len(offers)), key=lambda k: gains[k][0])
        if gains[k][0] <= 0:
            return
        left -= int(offers[k].prices[gains[k][1]] - offers[k].prices[chosen[k]])
        chosen[k] = gains[k][1]
