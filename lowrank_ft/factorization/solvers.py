"""Factors of one matrix: ``W (out, in) ~ U (out, r) @ V (r, in)``.

Contract of every solver here: the input may be of any float dtype on any device; the decomposition runs in float64 (on
the CPU where the device has none), or in float32 where a check shows that this is enough; the result is float32 on
the input's device; and the factors are *balanced*, ``U^T U = V V^T = diag(s)``, because training feels how a product is
split (docs/explanation/factorization.md).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_ft.errors import NonFiniteError
from lowrank_ft.factorization.ranks import resolve_rank
from lowrank_ft.factorization.subspace import leading_part

_LEAST_IMPORTANCE = 0.1


class Factors(NamedTuple):
    """``U`` of shape ``(out, r)`` and ``V`` of shape ``(r, in)``."""

    U: Tensor
    V: Tensor


def truncated_svd(weight: Tensor, rank: int, name: str = "weight") -> Factors:
    """The best rank-``rank`` approximation in the Frobenius norm (Eckart and Young 1936), balanced.

    ``Q`` spans the leading singular vectors of the shorter side (:func:`leading_part` finds it), and the other factor is
    the projection ``Q^T W``: the same error as a full SVD at a fraction of its time, and no division by small
    singular values.

    Args:
        weight: ``(out, in)``.
        rank: 1 to ``min(out, in)``.
        name: what error messages call the matrix.

    Raises:
        RankError: ``rank`` is out of range.
        NonFiniteError: the matrix holds NaN or infinity.
    """
    rank = resolve_rank(rank, (weight.shape[0], weight.shape[1]), name)
    matrix = _finite(_where_float64_is(weight), name)
    tall = matrix.shape[0] > matrix.shape[1]
    if tall:
        matrix = matrix.T
    basis, projection = leading_part(matrix, rank)
    # Row norms are the singular values, to the accuracy of the matrix and not of its square.
    scale = torch.linalg.vector_norm(projection, dim=1, dtype=torch.float64).sqrt().to(projection.dtype)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    left, right = basis * scale, projection / safe[:, None]
    if tall:
        left, right = right.T, left.T
    return Factors(_result(left, weight), _result(right, weight))


class Regression:
    """The rank-``r`` products that best map inputs to the dense outputs on calibration tokens, balanced.

    With ``X`` the dense model's inputs of a linear and ``X'`` those it gets in the converted model (columns are
    tokens; ``X' = X`` where ``cross`` is left out), minimizes

        |W X - U V X'|^2 + d |W - U V|^2,        d = damping * trace(X' X'^T) / in

    by reduced-rank regression: ``M = W (X X'^T + d I) L^-T`` for ``X' X'^T + d I = L L^T``, the best rank-r
    approximation of ``M``, and ``L^-T`` taken off again. Without ``cross`` that is ``M = W L``, the truncation of the whitened
    weight that SVD-LLM uses (Wang et al. 2024, arXiv 2403.07378). ``L`` is a Cholesky factor; without damping, the moments
    of real activations are singular, and ``Q s^1/2`` of an eigendecomposition takes its place. Directions that no token
    took carry no weight in the objective; damping decides them by the weight alone. All-zero moments, and none, give
    :func:`truncated_svd`.

    With the ``importance`` ``g`` of each output, every row of the errors is multiplied by ``g^1/2``: in
    ``|G^1/2 (W X - U V X')|^2 + d |G^1/2 (W - U V)|^2``, ``G^1/2 M`` takes the place of ``M``, and the roots are taken
    off ``U`` again. With the mean squared gradient of the loss as ``g``, the first term is a second-order estimate of what
    the error adds to the loss (the Fisher information in Kronecker-factored form with a diagonal output side; Martens
    and Grosse 2015, arXiv 1503.05671).

    Linears that read the same inputs share one object, and so one decomposition of the moments.

    Args:
        inputs: ``X' X'^T (in, in)``, symmetric; None where nothing was received.
        cross: ``X X'^T (in, in)``.
        damping: share of the mean input power that is added to every direction.
        name: what error messages call the linear.

    Raises:
        NonFiniteError: a moment holds NaN or infinity.
    """

    def __init__(
        self, inputs: Tensor | None, cross: Tensor | None = None, damping: float = 0.0, name: str = "weight"
    ) -> None:
        self._root: _Root | None = None
        if inputs is None:
            return
        moments = _working_copy(inputs, f"inputs of {name}:")
        power = moments.diagonal().mean()
        if not power > 0:
            return
        self._root = _Root(moments, damping * power)
        if cross is None:
            self._mixed = self._root.root
        else:
            mixed = _working_copy(cross, f"inputs of {name}:")
            self._mixed = self._root.divide_transposed(_plus_diagonal(mixed, damping * power))

    def __call__(self, weight: Tensor, rank: int, name: str = "weight", importance: Tensor | None = None) -> Factors:
        """Factors of ``weight (out, in)`` of a ``rank`` from 1 to ``min(out, in)``.

        Args:
            importance: of each output, ``(out,)``, not negative; None, or all zeros, where all count the same.

        Raises:
            RankError: ``rank`` is out of range.
            NonFiniteError: the weight or the importance holds NaN or infinity.
        """
        rank = resolve_rank(rank, (weight.shape[0], weight.shape[1]), name)
        if self._root is None:
            return truncated_svd(weight, rank, name)
        return balance(self._fit(self._root, weight, rank, name, importance))

    def _fit(self, root: "_Root", weight: Tensor, rank: int, name: str, importance: Tensor | None) -> Factors:
        """Not balanced. What is large in here is gone before that is done."""
        matrix = _working_copy(weight, name)
        roots = None if importance is None else importance_roots(_of_numbers(importance, name).to(matrix))
        target = matrix @ self._mixed.to(matrix.device)
        del matrix
        if roots is not None:
            target *= roots[:, None]
        # The singular vectors of the shorter side are enough: M = Q (Q^T M) = (M P^T) P, and V = Q^T M L^-1 or P L^-1.
        if target.shape[0] > target.shape[1]:
            basis, projection = (part.T for part in reversed(leading_part(target.T, rank)))
        else:
            basis, projection = leading_part(target, rank)
        del target
        if roots is not None:
            basis = basis / roots[:, None]
        return Factors(_result(basis, weight), _result(root.divide(projection.to(self._mixed)), weight))


class _Root:
    """``L`` with ``L L^T = A`` for a symmetric ``A (n, n)`` without negative part, and products with its inverse.

    ``root`` is lower triangular, and never inverted; or ``Q s^1/2`` where rounding leaves ``A`` singular, with ``Q s^-1/2``
    for its inverse.

    Args:
        moments: ``A``, plus ``added`` times the identity.
    """

    def __init__(self, moments: Tensor, added: float | Tensor = 0.0) -> None:
        self.root = _plus_diagonal(moments, added)
        self._inverse: Tensor | None = None
        # In the place of the copy: of the widest linears, these are the largest tensors of a conversion.
        _, failed = torch.linalg.cholesky_ex(
            self.root, out=(self.root, torch.empty_like(self.root[0, 0], dtype=torch.int32))
        )
        diagonal, eps = self.root.diagonal(), torch.finfo(moments.dtype).eps
        if failed.item() or diagonal.min().square() <= 100 * len(moments) * eps * diagonal.max().square():
            self._inverse, self.root = whitening(_plus_diagonal(moments, added))

    def divide(self, matrix: Tensor) -> Tensor:
        """``M L^-1``."""
        if self._inverse is not None:
            return matrix @ self._inverse.T
        return torch.linalg.solve_triangular(self.root, matrix, upper=False, left=False)

    def divide_transposed(self, matrix: Tensor) -> Tensor:
        """``M L^-T``."""
        if self._inverse is not None:
            return matrix @ self._inverse
        return torch.linalg.solve_triangular(self.root.T, matrix, upper=True, left=False)


def importance_roots(importance: Tensor) -> Tensor | None:
    """``g^1/2`` of an importance ``g (out,)`` over its root mean square; none is below a tenth, for ``g`` is an estimate.

    None where all is zero.
    """
    power = importance.mean()
    return (importance / power).sqrt().clamp_min(_LEAST_IMPORTANCE) if power > 0 else None


def regression_factors(
    weight: Tensor,
    rank: int,
    inputs: Tensor,
    cross: Tensor | None = None,
    damping: float = 0.0,
    name: str = "weight",
) -> Factors:
    """:class:`Regression` of one linear."""
    return Regression(inputs.to(weight.device), cross, damping, name)(weight, rank, name)


def whitening(moments: Tensor) -> tuple[Tensor, Tensor]:
    """``Q s^-1/2`` and ``Q s^1/2``, each ``(n, n)``, for a symmetric ``(n, n)`` matrix ``Q s Q^T`` without negative part.

    Eigenvalues that rounding cannot tell from zero count as zero in both.
    """
    values, vectors = torch.linalg.eigh((moments + moments.T) / 2)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root = torch.where(kept, values, torch.zeros_like(values)).sqrt()
    inverse = torch.where(kept, 1 / torch.where(kept, root, torch.ones_like(root)), torch.zeros_like(root))
    return vectors * inverse, vectors * root


def balance(factors: Factors) -> Factors:
    """The same product, split evenly: ``U^T U = V V^T = diag(s)``.

    QR of both factors, SVD of the small core ``R_U R_V^T``, and ``sqrt(s)`` to each side. Costs ``O((out + in) r^2)``;
    the dense product is never formed. float64 factors stay so.
    """
    dtype = torch.promote_types(torch.float32, factors.U.dtype)
    q_left, r_left = torch.linalg.qr(_working_copy(factors.U, "U"))
    q_right, r_right = torch.linalg.qr(_working_copy(factors.V, "V").T)
    core_left, s, core_right = torch.linalg.svd(r_left @ r_right.T)
    root = s.sqrt()
    balanced_left = q_left @ (core_left * root)
    balanced_right = (root[:, None] * core_right) @ q_right.T
    left, right = (m.to(device=factors.U.device, dtype=dtype) for m in (balanced_left, balanced_right))
    return Factors(left.contiguous(), right.contiguous())


def singular_values(weight: Tensor, name: str = "weight") -> Tensor:
    """All singular values of ``weight (out, in)``, descending, float64 on the CPU."""
    return torch.linalg.svdvals(_working_copy(weight, name)).double().cpu()


def gram_singular_values(weight: Tensor, name: str = "weight") -> Tensor:
    """As :func:`singular_values`, several times faster; those below 1e-7 of the largest have few or no right digits."""
    matrix = _working_copy(weight, name)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    return _roots(matrix @ matrix.T)


def weighted_singular_values(
    weight: Tensor, moments: Tensor, name: str = "weight", importance: Tensor | None = None
) -> Tensor:
    """Singular values of ``W A^1/2`` for ``W (out, in)`` and ``A (in, in)``, as :func:`gram_singular_values`.

    With the ``importance`` ``g (out,)`` of each output, of ``diag(g)^1/2 W A^1/2``.
    """
    matrix, moments = _working_copy(weight, name), _working_copy(moments, f"inputs of {name}:")
    if importance is not None:
        matrix = _of_numbers(importance, name).to(matrix).sqrt()[:, None] * matrix
    if matrix.shape[0] <= matrix.shape[1]:
        return _roots(matrix @ moments @ matrix.T)
    root = _Root(moments).root
    return _roots(root.T @ (matrix.T @ matrix) @ root)


def _roots(gram: Tensor) -> Tensor:
    """Roots of the eigenvalues, descending, float64 on the CPU."""
    return torch.linalg.eigvalsh((gram + gram.T) / 2).flip(-1).clamp_min(0).sqrt().double().cpu()


def retained_energy(values: Tensor, rank: int) -> float:
    """``sum(kept s^2) / sum(s^2)``; 1.0 for an all-zero spectrum, of which nothing can be lost."""
    squares = values.double().square()
    total = squares.sum().item()
    return squares[:rank].sum().item() / total if total > 0 else 1.0


def exact(tensor: Tensor) -> Tensor:
    """In float64, for a decomposition: where it is, or on the CPU where the device has no float64."""
    return _where_float64_is(tensor).double()


def _where_float64_is(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device)


def working_dtype(device: torch.device) -> torch.dtype:
    """Of sums and products: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _plus_diagonal(matrix: Tensor, value: float | Tensor) -> Tensor:
    result = matrix.clone()
    result.diagonal().add_(value)
    return result


def _working_copy(weight: Tensor, name: str) -> Tensor:
    return _finite(exact(weight), name)


def _finite(weight: Tensor, name: str) -> Tensor:
    if not all(torch.isfinite(end) for end in torch.aminmax(weight)):  # one pass; NaN is either end
        count = int((~torch.isfinite(weight)).sum())
        raise NonFiniteError(
            f"{name} {tuple(weight.shape)} holds {count} NaN or infinite values; "
            "repair or re-download the checkpoint, or exclude that module"
        )
    return weight


def _of_numbers(importance: Tensor, name: str) -> Tensor:
    if not torch.isfinite(importance).all():
        raise NonFiniteError(
            f"the gradients of the loss at the outputs of {name} hold NaN or infinity on the calibration data; convert in "
            "float32 or bfloat16 (--dtype), or leave that module dense with --exclude-modules"
        )
    return importance


def _result(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(device=like.device, dtype=torch.float32).contiguous()
