"""The leading singular subspace of a matrix, by whichever solver is the fastest that gets it right.

    range finder   random vectors, multiplied by M M^T until what they span keeps no more energy (Halko, Martinsson and
                   Tropp 2011, arXiv 0909.4061, algorithm 4.4 with a stopping rule): ranks far below the shorter side
    float32 Gram   eigenvectors of the smaller Gram matrix in float32: large matrices
    float64 Gram   the same in float64: small matrices, and where a check fails

Each result but the last is checked: the energy that it loses, measured on the matrix, must be the least possible one up
to a relative error of 1e-4. The least is estimated from what the result does not use: from the eigenvalues that are left
over, or from what one more multiplication still gains.
"""

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""Of the lost energy ``|M - Q Q^T M|^2``, relative."""
_LARGE = 512  # of the shorter side; below, float64 takes milliseconds
_HUGE = 2048  # of the shorter side; below, the Gram matrix is faster than a few rounds
_LOW = 16  # the shorter side over the rank, from which on the range finder is tried
_LEAST_LOST = 0.02  # of the energy; where less is lost, float32 cannot tell how much
_MOST_ROUNDS = 12
_PARTS, _LEAST_ROWS = 8, 128  # of a Gram matrix, so that its upper half is left out


def leading_part(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``Q (rows, rank)`` and ``P = Q^T M (rank, columns)``: ``Q P`` is the best approximation of this rank.

    The columns of ``Q`` are orthonormal, and are the leading left singular vectors, largest first.

    Args:
        matrix: ``M``, finite, on a device that has float64. The results are float64, but float32 where ``M`` is of at
            most 32 bits and a float32 solver was enough.
    """
    small = min(matrix.shape)
    if small >= _LARGE and rank < small:
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        scale = _scale(matrix)
        single = (matrix.to(dtype) / scale if scale != 1 else matrix).float()
        found = _range_finder(single, rank) if small >= _HUGE and rank * _LOW <= small else None
        found = _checked_gram(single, rank) if found is None else found
        if found is not None:
            basis, projection = (part.to(dtype) for part in found)
            return basis, projection * scale if scale != 1 else projection
    matrix = matrix.double()
    basis = _gram(matrix, rank)[0]
    return basis, _projection(basis, matrix)


def _gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The basis by the smaller Gram matrix, and all of its eigenvalues, largest first."""
    wide = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(_lower_half(matrix if wide else matrix.T))
    leading = vectors.flip(-1)[:, :rank]
    return leading if wide else torch.linalg.qr(matrix @ leading).Q, values.flip(-1)


def _lower_half(matrix: Tensor) -> Tensor:
    """``M M^T``, of which ``eigh`` reads the lower half; little more than that is computed."""
    rows = len(matrix)
    gram = matrix.new_zeros(rows, rows)
    step = max(_LEAST_ROWS, -(-rows // _PARTS))
    for start in range(0, rows, step):
        end = min(start + step, rows)
        gram[start:end, :end] = matrix[start:end] @ matrix[:end].T
    return gram


def _checked_gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """None where what is lost cannot be told from rounding, or is more than the eigenvalues left over say."""
    basis, values = _gram(matrix, rank)
    projection = _projection(basis, matrix)
    total = _energy(matrix)
    lost = total - _energy(projection)
    least = values[rank:].clamp_min(0).double().sum().item()
    if lost < _LEAST_LOST * total or abs(lost - least) > TOLERANCE * lost:
        return None
    return basis, projection


def _range_finder(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """None where the energy still grows after the last round."""
    generator = torch.Generator().manual_seed(0)
    width = min(min(matrix.shape), rank + max(16, rank // 2))
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    total, before = _energy(matrix), 0.0
    for _ in range(_MOST_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        projection = basis.T @ matrix
        vectors = torch.linalg.eigh((projection @ projection.T).double()).eigenvectors.flip(-1)[:, :rank].to(matrix)
        leading = vectors.T @ projection
        kept = _energy(leading)
        lost = total - kept
        if lost < _LEAST_LOST * total:
            return None
        # Each round gains less than the one before, by about the same factor: twice the last gain bounds what is missing.
        if 2 * (kept - before) <= TOLERANCE * lost:
            return basis @ vectors, leading
        before = kept
    return None


def _projection(basis: Tensor, matrix: Tensor) -> Tensor:
    """``Q^T M``, laid out as ``M`` is, so that no transposed copy is made later."""
    return basis.T @ matrix if matrix.is_contiguous() else (matrix.T @ basis).T


def _scale(matrix: Tensor) -> float:
    """The largest size of an entry where its square is far from 1, and may be no float32 number; else 1."""
    low, high = torch.aminmax(matrix)
    largest = max(-low.item(), high.item())
    return 1.0 if largest == 0 or 1e-6 < largest < 1e6 else largest


def _energy(matrix: Tensor) -> float:
    """The sum of squares: of each row in the dtype of the matrix, of the rows in float64."""
    rows = matrix if matrix.is_contiguous() else matrix.T
    return torch.linalg.vector_norm(rows, dim=1).double().square().sum().item()
