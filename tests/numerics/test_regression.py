"""Activation-aware factors against a float64 reference written the obvious way, and against what they promise."""

import pytest
import torch

from lowrank_ft.errors import NonFiniteError, RankError
from lowrank_ft.factorization.solvers import (
    Factors,
    Regression,
    regression_factors,
    truncated_svd,
    weighted_singular_values,
    whitening,
)
from tests.numerics.test_solvers import assert_balanced, naive, random_matrix

SHAPES = [(12, 9), (9, 12), (10, 10)]


def activations(features, tokens=200, seed=0, decay=0.6):
    """Inputs whose directions differ by orders of magnitude, as those of real models do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return (mix * decay ** torch.arange(features)) @ torch.randn(
        features, tokens, generator=generator, dtype=torch.float64
    )


def damped(x, other, damping):
    """Data whose moments are the damped ones: the regularizer as extra columns, shared by both sides."""
    features = x.shape[0]
    extra = (damping * other.square().sum() / features).sqrt() * torch.eye(features, dtype=torch.float64)
    return torch.cat([x, extra], 1), torch.cat([other, extra], 1)


def naive_regression(weight, rank, x, other):
    """Least squares onto the row space of the inputs, then the best rank-r approximation of the fitted outputs."""
    fitted = weight @ x @ torch.linalg.pinv(other) @ other
    u, _, _ = torch.linalg.svd(fitted, full_matrices=False)
    return u[:, :rank] @ u[:, :rank].T @ weight @ x @ torch.linalg.pinv(other)


def objective(weight, product, x, other):
    return (weight @ x - product @ other).square().sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("anchored", [False, True])
def test_it_is_reduced_rank_regression(shape, damping, anchored):
    weight, x = random_matrix(shape), activations(shape[1])
    other = x + 0.3 * activations(shape[1], seed=1) if anchored else x
    cross = x @ other.T if anchored else None
    dx, dother = damped(x, other, damping)
    for rank in (1, 4, min(shape)):
        factors = regression_factors(weight, rank, other @ other.T, cross, damping)
        wanted = naive_regression(weight, rank, dx, dother)
        found = factors.U.double() @ factors.V.double()
        torch.testing.assert_close(found @ dother, wanted @ dother, atol=1e-5, rtol=1e-4)
        assert_balanced(factors)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_tail_of_the_whitened_spectrum(shape):
    weight, x, rank = random_matrix(shape), activations(shape[1]), 4
    factors = regression_factors(weight, rank, x @ x.T)
    error = objective(weight, factors.U.double() @ factors.V.double(), x, x)
    tail = torch.linalg.svdvals(weight @ x)[rank:].square().sum()
    torch.testing.assert_close(error, tail, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("anchored", [False, True])
def test_no_other_factors_of_that_rank_do_better(anchored):
    weight, x, rank = random_matrix((12, 9)), activations(9), 4
    other = x + 0.5 * activations(9, seed=3) if anchored else x
    factors = regression_factors(weight, rank, other @ other.T, x @ other.T if anchored else None)
    best = objective(weight, factors.U.double() @ factors.V.double(), x, other)
    plain = truncated_svd(weight, rank)
    assert objective(weight, plain.U.double() @ plain.V.double(), x, other) > best
    generator = torch.Generator().manual_seed(5)
    for size in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(20):
            u = factors.U.double() + size * torch.randn(factors.U.shape, generator=generator, dtype=torch.float64)
            v = factors.V.double() + size * torch.randn(factors.V.shape, generator=generator, dtype=torch.float64)
            assert objective(weight, u @ v, x, other) >= best * (1 - 1e-6)


def weighted(shape, anchored):
    """A weight, what it gets in both models, and an importance of its outputs that spans two orders of magnitude."""
    weight, x = random_matrix(shape), activations(shape[1])
    other = x + 0.3 * activations(shape[1], seed=1) if anchored else x
    generator = torch.Generator().manual_seed(7)
    return weight, x, other, 10 ** (2 * torch.rand(shape[0], generator=generator, dtype=torch.float64) - 5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("anchored", [False, True])
def test_with_importance_it_is_the_regression_of_the_scaled_outputs(shape, damping, anchored):
    weight, x, other, importance = weighted(shape, anchored)
    cross = x @ other.T if anchored else None
    dx, dother = damped(x, other, damping)
    scale = importance.sqrt()[:, None]
    for rank in (1, 4, min(shape)):
        factors = Regression(other @ other.T, cross, damping)(weight, rank, importance=importance)
        wanted = naive_regression(scale * weight, rank, dx, dother) / scale
        found = factors.U.double() @ factors.V.double()
        torch.testing.assert_close(scale * (found @ dother), scale * (wanted @ dother), atol=1e-7, rtol=1e-4)
        assert_balanced(factors)


@pytest.mark.parametrize("anchored", [False, True])
def test_with_importance_the_scaled_error_is_the_least(anchored):
    """Its gradient is zero there, and factors that weigh all outputs the same have more of it."""
    weight, x, other, importance = weighted((12, 9), anchored)
    solver = Regression(other @ other.T, x @ other.T if anchored else None)
    scale = importance.sqrt()[:, None]

    def error(u, v):
        return (scale * (weight @ x - u @ v @ other)).square().sum()

    factors = [f.double().requires_grad_() for f in solver(weight, 4, importance=importance)]
    least = error(*factors)
    assert least < 0.95 * error(*(f.double() for f in solver(weight, 4)))
    gradients = torch.autograd.grad(least, factors)
    beside = torch.autograd.grad(error(*(1.1 * f for f in factors)), factors)
    assert all(g.norm() < 1e-4 * b.norm() for g, b in zip(gradients, beside, strict=True))


def test_importance_is_relative_and_none_is_forgotten():
    weight, x, _, importance = weighted((12, 9), False)
    solver = Regression(x @ x.T)
    plain = solver(weight, 3)
    for same in (torch.zeros(12), torch.full((12,), 1e-20)):  # squared gradients can be this small
        for a, b in zip(solver(weight, 3, importance=same), plain, strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(
        solver(weight, 3, importance=importance), solver(weight, 3, importance=1e-9 * importance), strict=True
    ):
        torch.testing.assert_close(a, b)
    # An output without any measured gradient still counts for a hundredth of the mean.
    lone = torch.zeros(12, dtype=torch.float64)
    lone[0] = 1.0
    product = torch.linalg.multi_dot([*solver(weight, 8, importance=lone), x.float()]).double()
    assert (product - weight @ x).norm() < 0.5 * (weight @ x).norm()


def test_singular_moments():
    """Fewer tokens than features: exact on what was seen."""
    weight, x = random_matrix((12, 9), decay=1.0), activations(9, tokens=4)
    factors = regression_factors(weight, 4, x @ x.T)
    torch.testing.assert_close(factors.U.double() @ factors.V.double() @ x, weight @ x, atol=1e-5, rtol=1e-5)


def test_ill_conditioned_moments():
    weight, x = random_matrix((12, 9)), activations(9, decay=0.02)
    for damping in (0.0, 0.01):
        factors = regression_factors(weight, 3, x @ x.T, None, damping)
        assert all(torch.isfinite(f).all() for f in factors)
        error = objective(weight, factors.U.double() @ factors.V.double(), x, x)
        assert error <= objective(weight, torch.zeros_like(weight), x, x)


def test_zero_moments_give_the_truncated_svd():
    weight = random_matrix((12, 9))
    factors = regression_factors(weight, 3, torch.zeros(9, 9))
    torch.testing.assert_close((factors.U @ factors.V).double(), naive(weight, 3), atol=3e-6, rtol=1e-5)


def test_damping_leads_from_the_data_to_the_weight():
    weight, x = random_matrix((12, 9)), activations(9)
    strong = regression_factors(weight, 3, x @ x.T, None, 1e6)
    torch.testing.assert_close((strong.U @ strong.V).double(), naive(weight, 3), atol=1e-4, rtol=1e-3)


def test_whitening_inverts_what_there_is():
    x = activations(9, tokens=5)
    inverse, root = whitening(x @ x.T)
    torch.testing.assert_close(root @ root.T, x @ x.T, atol=1e-9, rtol=1e-9)
    projector = inverse.T @ (x @ x.T) @ inverse
    torch.testing.assert_close(projector.trace(), torch.tensor(5.0, dtype=torch.float64), atol=1e-6, rtol=0)


def test_bad_input():
    weight, moments = random_matrix((12, 9)), torch.eye(9)
    with pytest.raises(NonFiniteError, match="layers.3.q_proj"):
        regression_factors(weight, 3, moments * float("nan"), name="layers.3.q_proj")
    with pytest.raises(RankError, match="exceeds"):
        regression_factors(weight, 10, moments)
    assert isinstance(regression_factors(weight, 3, moments), Factors)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tail_of_the_weighted_spectrum_is_the_error_of_the_fit(shape):
    weight, x, _, importance = weighted(shape, False)
    squares = weighted_singular_values(weight, x @ x.T, importance=importance).square()
    scale = importance.sqrt()[:, None]
    for rank in (1, 4, 8):
        u, v = Regression(x @ x.T)(weight, rank, importance=importance)
        error = (scale * (weight.double() - u.double() @ v.double()) @ x).square().sum()
        torch.testing.assert_close(squares[rank:].sum(), error, rtol=1e-4, atol=1e-5 * squares[0].item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_importance_that_is_not_a_number_is_refused_by_name(bad):
    weight, x, _, importance = weighted((12, 9), False)
    importance[3] = bad
    message = r"the gradients of the loss at the outputs of layers\.3\.q_proj hold NaN or infinity"
    with pytest.raises(NonFiniteError, match=message):
        Regression(x @ x.T)(weight, 3, "layers.3.q_proj", importance)
    with pytest.raises(NonFiniteError, match=message):
        weighted_singular_values(weight, x @ x.T, "layers.3.q_proj", importance)
