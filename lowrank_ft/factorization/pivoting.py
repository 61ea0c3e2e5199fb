"""The form in which factors are stored: the fewest numbers that a rank needs.

A product ``U V`` of rank r has ``r * (out + in)`` numbers, and ``r * r`` of them are redundant, for ``U A`` and ``A^-1 V``
give the same product. Take r rows of the product as they are; each other row is a combination of those:

    U V = P [I; C] V'        V' (r, in): rows of the product,    C (out - r, r),    P: where each row belongs

That is ``r * (out + in - r)`` numbers, never more than the dense ``out * in``. The mirror image takes r columns:

    U V = U' [I, C] P        U' (out, r): columns of the product,    C (r, in - r)

(Zhao, Zhang and Cannistraci, ICML 2025, arXiv 2501.19090.) Which rows are taken decides how large C becomes, and with
it what rounding costs. They are found by an LU decomposition with partial pivoting, and then rows are exchanged until
no entry of C is above 1.05: each exchange multiplies the volume of the taken rows by that entry, so it ends (Goreinov
et al. 2010, "How to find a good submatrix"). Errors of a few entries of V' reach many rows of the product, so in 16 bits
the rest of each vector makes up for what rounding has done to its beginning (:func:`rounded`).

Training wants the other form, balanced ``U V`` (docs/explanation/factorization.md): pivot on the way to a file, and
:func:`unpivot` on the way back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_ft.errors import require_choice
from lowrank_ft.factorization.ranks import Shape
from lowrank_ft.factorization.solvers import Factors, balance, exact

SIDES = ("output", "input")
BOUND = 1.05
"""No entry of C is larger. Against a bound of 2, the error of 16 bits is a quarter less; exchanges are cheap."""
_COLUMNS = 128  # rounded one by one, before the errors of all are passed on in one product


class Pivoted(NamedTuple):
    """A product of rank r in its pivoted form.

    Attributes:
        U: ``C (out - r, r)`` for the side ``output``, ``U' (out, r)`` for the side ``input``.
        V: ``V' (r, in)`` for the side ``output``, ``C (r, in - r)`` for the side ``input``.
        order: int32; for the side ``output``, ``(out,)``: output i is entry ``order[i]`` of ``[h; C h]``. For the side
            ``input``, ``(in,)``: entry j of ``[taken; others]`` is input ``order[j]``.
        side: where the identity is, one of ``SIDES``.
    """

    U: Tensor
    V: Tensor
    order: Tensor
    side: str


def pivot_side(shape: Shape, rank: int) -> str | None:
    """The side on which a layer of this shape is pivoted: the shorter one, where the gather is cheap.

    Of a square one the inputs: gathering them is faster than gathering what two products have put together.

    None where nothing is gained: the rank is the length of both sides.
    """
    out_features, in_features = shape
    side = "output" if out_features < in_features else "input"
    if rank < min(shape):
        return side
    return None if out_features == in_features else "input" if side == "output" else "output"


def pivot(factors: Factors, side: str | None = None) -> Pivoted:
    """The same product in its pivoted form, float32.

    Args:
        factors: ``U (out, r)`` and ``V (r, in)``, of any float dtype on any device; computed in float64. The product may
            have a rank below r.
        side: one of ``SIDES``, longer than r; by default that of :func:`pivot_side`.

    Raises:
        ConfigError: no such side, or it has no more than r entries.
    """
    left, right = map(exact, factors)
    shape, rank = (left.shape[0], right.shape[1]), left.shape[1]
    side = side or pivot_side(shape, rank) or "output"
    possible = tuple(s for s, length in zip(SIDES, shape, strict=True) if length > rank)
    require_choice(f"side of a {shape[0]} x {shape[1]} product of rank {rank}", side, possible)
    if side == "input":
        left, right = right.T, left.T
    # An orthonormal basis has r independent rows even where the product has a lower rank than r.
    basis, triangle = torch.linalg.qr(left)
    taken, others, coefficients = _independent_rows(basis)
    rows = basis[taken] @ (triangle @ right)
    place = torch.cat([taken, others])
    if side == "input":
        return Pivoted(_stored(rows.T, factors.U), _stored(coefficients.T, factors.V), place.int(), side)
    return Pivoted(_stored(coefficients, factors.U), _stored(rows, factors.V), place.argsort().int(), side)


def whole(pivoted: Pivoted) -> Factors:
    """The same product as plain factors, ``U (out, r)`` and ``V (r, in)``, not balanced; dtypes stay as they are."""
    eye = torch.eye(min(pivoted.U.shape[1], pivoted.V.shape[0]), dtype=pivoted.U.dtype, device=pivoted.U.device)
    if pivoted.side == "output":
        return Factors(torch.cat([eye, pivoted.U])[pivoted.order], pivoted.V)
    return Factors(pivoted.U, torch.cat([eye, pivoted.V], dim=1)[:, pivoted.order.argsort()])


def unpivot(pivoted: Pivoted) -> Factors:
    """The same product as balanced factors, as they are trained; float32."""
    left, right = exact(pivoted.U), exact(pivoted.V)
    plain = whole(Pivoted(left, right, pivoted.order.to(left.device), pivoted.side))
    return Factors(*(f.to(pivoted.U.device) for f in balance(plain)))


def rounded(pivoted: Pivoted, dtype: torch.dtype) -> Pivoted:
    """The same in ``dtype``, rounded so that the error of the *product* is small, and not that of every entry.

    With ``U V = [I; C] V'``: each column of V' is rounded entry by entry, and the entries that follow make up for the
    error as it shows in ``[I; C] V'``. Then C is fitted to the rows that are there now, and rounded the same way (Frantar
    et al. 2023, arXiv 2210.17323, with other curvatures). Computed in float64.
    """
    output = pivoted.side == "output"
    coefficients, rows = (pivoted.U, pivoted.V) if output else (pivoted.V.T, pivoted.U.T)
    coefficients, rows = exact(coefficients), exact(rows)
    others = coefficients @ rows
    eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    rows = _rounded(rows.T, eye + coefficients.T @ coefficients, dtype).T
    moments = rows @ rows.T
    damped = moments + 1e-8 * moments.diagonal().mean().clamp_min(1e-30) * eye
    coefficients = torch.linalg.solve(damped, rows @ others.T + (damped - moments) @ coefficients.T).T
    coefficients = _rounded(coefficients, damped, dtype)
    parts = (coefficients, rows) if output else (rows.T, coefficients.T)
    left, right = (p.to(device=pivoted.U.device, dtype=dtype).contiguous() for p in parts)
    return pivoted._replace(U=left, V=right)


def _rounded(matrix: Tensor, curvature: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of ``matrix (n, r)`` in ``dtype`` with little ``e curvature e^T``, for the errors ``e (1, r)`` of each."""
    # The entries that are left make up for an error by the Cholesky factor of the inverse.
    inverse = torch.linalg.inv(curvature)
    passed_on = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    left, result = matrix.clone(), torch.empty_like(matrix)
    for first in range(0, matrix.shape[1], _COLUMNS):
        last = min(first + _COLUMNS, matrix.shape[1])
        errors = torch.zeros_like(left[:, first:last])
        for j in range(first, last):
            result[:, j] = left[:, j].to(dtype).to(left)
            errors[:, j - first] = (left[:, j] - result[:, j]) / passed_on[j, j]
            left[:, j + 1 : last] -= torch.outer(errors[:, j - first], passed_on[j, j + 1 : last])
        left[:, last:] -= errors @ passed_on[first:last, last:]
    return result


def _independent_rows(basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of an orthonormal ``(n, r)``: r rows, the others, both ascending, and C and ``C`` for ``others = C taken``."""
    rank = basis.shape[1]
    places = list(range(len(basis)))
    for k, swapped in enumerate(torch.linalg.lu_factor(basis).pivots.tolist()):  # one-based: row k went there
        places[k], places[swapped - 1] = places[swapped - 1], places[k]
    taken, others = (torch.tensor(p, device=basis.device, dtype=torch.long) for p in (places[:rank], places[rank:]))
    coefficients = _solved(basis, taken, others)
    while coefficients.numel():
        i, j = divmod(int(coefficients.abs().argmax()), rank)
        pivot_value = coefficients[i, j].item()
        if abs(pivot_value) <= BOUND * (1 - 1e-9):
            break
        # Exchange row i of the others with row j of the taken ones; C changes by a matrix of rank 1.
        column, row = coefficients[:, j].clone(), coefficients[i].clone()
        column[i] -= 1
        row[j] += 1
        coefficients -= torch.outer(column / pivot_value, row)
        taken[j], others[i] = others[i].clone(), taken[j].clone()
    taken, others = taken.sort().values, others.sort().values  # neighbours stay together: a gather is faster
    return taken, others, _solved(basis, taken, others)


def _solved(basis: Tensor, taken: Tensor, others: Tensor) -> Tensor:
    return torch.linalg.solve(basis[taken], basis[others], left=False)


def _stored(matrix: Tensor, like: Tensor) -> Tensor:
    return matrix.to(device=like.device, dtype=torch.promote_types(torch.float32, like.dtype)).contiguous()
