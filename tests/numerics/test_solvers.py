"""Solvers against ``torch.linalg.svd`` in float64, written the obvious way, and against what they promise."""

import pytest
import torch

from lowrank_ft.errors import NonFiniteError, RankError
from lowrank_ft.factorization import subspace
from lowrank_ft.factorization.solvers import Factors, balance, retained_energy, singular_values, truncated_svd

SHAPES = [(24, 24), (40, 16), (16, 40), (1, 7), (7, 1)]


def random_matrix(shape, decay=0.8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator, dtype=torch.float64))
    return (u * decay ** torch.arange(min(shape), dtype=torch.float64)) @ v.T


def naive(weight, rank):
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


def assert_balanced(factors):
    left = factors.U.double().T @ factors.U.double()
    right = factors.V.double() @ factors.V.double().T
    scale = left.diagonal().max()
    torch.testing.assert_close(left / scale, right / scale, atol=2e-6, rtol=0)
    torch.testing.assert_close(left / scale, torch.diag(left.diagonal()) / scale, atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_truncated_svd(shape, dtype):
    weight = random_matrix(shape).to(dtype)
    for rank in {1, min(shape) // 2 or 1, min(shape)}:
        factors = truncated_svd(weight, rank)
        assert factors.U.shape == (shape[0], rank)
        assert factors.V.shape == (rank, shape[1])
        assert factors.U.dtype == torch.float32
        torch.testing.assert_close((factors.U @ factors.V).double(), naive(weight, rank), atol=3e-6, rtol=1e-5)
        assert_balanced(factors)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_error_is_the_tail_and_no_other_factors_do_better(shape):
    weight, rank = random_matrix(shape), 5
    factors = truncated_svd(weight, rank)
    error = (weight - factors.U.double() @ factors.V.double()).square().sum()
    tail = torch.linalg.svdvals(weight)[rank:].square().sum()
    torch.testing.assert_close(error, tail, rtol=1e-4, atol=1e-9)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(20):
            other_u = factors.U + size * torch.randn(factors.U.shape, generator=generator)
            other_v = factors.V + size * torch.randn(factors.V.shape, generator=generator)
            assert (weight - other_u.double() @ other_v.double()).square().sum() >= error * (1 - 1e-6)


def test_rank_deficient_zero_and_badly_scaled_matrices():
    low = random_matrix((20, 3)) @ random_matrix((3, 30))
    factors = truncated_svd(low, 8)
    torch.testing.assert_close((factors.U @ factors.V).double(), low, atol=1e-6, rtol=0)
    zero = truncated_svd(torch.zeros(6, 4), 2)
    assert torch.equal(zero.U @ zero.V, torch.zeros(6, 4))
    steep = random_matrix((32, 32), decay=0.3)  # condition number 1e16
    factors = truncated_svd(steep, 32)
    torch.testing.assert_close((factors.U @ factors.V).double(), steep, atol=1e-6, rtol=0)
    tiny = truncated_svd(random_matrix((8, 8)) * 1e-20, 8)
    torch.testing.assert_close((tiny.U.double() @ tiny.V.double()) * 1e20, random_matrix((8, 8)), atol=1e-5, rtol=0)


def test_balance_keeps_the_product_and_evens_the_split():
    generator = torch.Generator().manual_seed(0)
    skewed = Factors(torch.randn(30, 6, generator=generator) * 1e3, torch.randn(6, 20, generator=generator) * 1e-3)
    even = balance(skewed)
    torch.testing.assert_close(even.U @ even.V, skewed.U @ skewed.V, rtol=1e-4, atol=1e-4)
    assert_balanced(even)


def test_bad_input():
    weight = torch.ones(4, 4)
    weight[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layer\.weight \(4, 4\) holds 1 NaN"):
        truncated_svd(weight, 2, "layer.weight")
    with pytest.raises(RankError):
        truncated_svd(torch.ones(4, 4), 5)


def test_spectrum_and_energy():
    values = singular_values(random_matrix((12, 9)))
    torch.testing.assert_close(values, 0.8 ** torch.arange(9, dtype=torch.float64))
    assert retained_energy(values, 9) == pytest.approx(1.0)
    assert retained_energy(torch.tensor([4.0, 3.0]), 1) == pytest.approx(16 / 25)
    assert retained_energy(torch.zeros(3), 1) == 1.0


def slow_matrix(rows, columns, exponent=0.6, seed=0):
    """As weights of trained models have it: a spectrum that falls slowly, so that much lies in its tail."""
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(rows, small, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, small, generator=generator, dtype=torch.float64))
    return (u * torch.arange(1, small + 1, dtype=torch.float64) ** -exponent) @ v.T


def lost(matrix, basis):
    return (matrix.square().sum() - (basis.T @ matrix).square().sum()).item()


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (128, 128)])
@pytest.mark.parametrize("rank", [4, 40])
def test_the_fast_solvers_lose_no_more_than_they_have_to(monkeypatch, shape, rank):
    monkeypatch.setattr(subspace, "_LARGE", 32)
    monkeypatch.setattr(subspace, "_HUGE", 64)
    monkeypatch.setattr(subspace, "_MOST_ROUNDS", 60)
    matrix = slow_matrix(*shape) * 1e-22
    used = spies(monkeypatch)
    basis, projection = subspace.leading_part(matrix, rank)
    assert used == (["_range_finder"] if rank == 4 else ["_checked_gram"])
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-5, rtol=0)
    least = torch.linalg.svdvals(matrix)[rank:].square().sum().item()
    assert least * (1 - 1e-4) <= lost(matrix, basis) <= least * (1 + 1e-4)
    torch.testing.assert_close(projection, basis.T @ matrix, atol=1e-6 * matrix.abs().max().item(), rtol=1e-4)
    # The singular vectors themselves, so its rows are orthogonal.
    gram = projection @ projection.T / projection.square().sum()
    assert (gram - gram.diagonal().diag()).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(64, 80), (80, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_few_bits_take_the_fast_solvers_as_they_are(monkeypatch, shape, dtype):
    """No rounding is added to that of the weight."""
    monkeypatch.setattr(subspace, "_LARGE", 32)
    used = spies(monkeypatch)
    weight = (slow_matrix(*shape) * 1e-20).to(dtype)
    factors = truncated_svd(weight, 20)
    assert used == ["_checked_gram"]
    assert all(f.is_contiguous() for f in factors)
    scaled = weight.double() * 1e20
    product = factors.U.double() @ factors.V.double() * 1e20
    torch.testing.assert_close(product, naive(scaled, 20), atol=3e-6, rtol=1e-4)
    assert_balanced(Factors(factors.U * 1e10, factors.V * 1e10))


def spies(monkeypatch):
    """The fast solvers that gave a result, in order."""
    used = []
    for name in ("_range_finder", "_checked_gram"):
        solve = getattr(subspace, name)

        def spy(*arguments, name=name, solve=solve):
            found = solve(*arguments)
            used.extend([name] if found is not None else [])
            return found

        monkeypatch.setattr(subspace, name, spy)
    return used


def test_float64_where_float32_cannot_tell(monkeypatch):
    monkeypatch.setattr(subspace, "_LARGE", 32)
    used = spies(monkeypatch)
    steep = slow_matrix(64, 80, exponent=3.0)
    basis, _ = subspace.leading_part(steep, 32)
    assert used == []
    least = torch.linalg.svdvals(steep)[32:].square().sum().item()
    assert lost(steep, basis) == pytest.approx(least, rel=1e-4)


def test_a_wrong_subspace_is_noticed(monkeypatch):
    """As of a broken driver: the eigenvalues are right and the vectors are not."""
    monkeypatch.setattr(subspace, "_LARGE", 32)
    used, gram = spies(monkeypatch), subspace._gram

    def broken(matrix, rank):
        basis, values = gram(matrix, rank)
        return (basis.roll(1, 0), values) if matrix.dtype == torch.float32 else (basis, values)

    monkeypatch.setattr(subspace, "_gram", broken)
    matrix = slow_matrix(64, 80)
    basis, _ = subspace.leading_part(matrix, 20)
    assert used == []
    assert lost(matrix, basis) == pytest.approx(torch.linalg.svdvals(matrix)[20:].square().sum().item(), rel=1e-9)


def test_a_range_finder_that_does_not_settle_gives_way(monkeypatch):
    monkeypatch.setattr(subspace, "_LARGE", 32)
    monkeypatch.setattr(subspace, "_HUGE", 64)
    monkeypatch.setattr(subspace, "_MOST_ROUNDS", 1)
    used = spies(monkeypatch)
    subspace.leading_part(slow_matrix(96, 128, exponent=0.2), 4)
    assert used == ["_checked_gram"]
