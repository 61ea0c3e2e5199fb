import random

import pytest

from lowrank_ft.errors import RankError
from lowrank_ft.factorization.ranks import (
    dense_parameters,
    factored_parameters,
    rank_at,
    rank_for_energy,
    ranks_for_param_ratio,
    resolve_rank,
    trained_parameters,
)


@pytest.mark.parametrize("shape", [(7, 5), (64, 64), (33, 100), (1, 9)])
def test_every_rank_below_full_saves_parameters(shape):
    sizes = [factored_parameters(shape, r) for r in range(1, min(shape) + 1)]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == dense_parameters(shape)
    assert all(factored_parameters(shape, r) == trained_parameters(shape, r) - r * r for r in range(1, min(shape)))


@pytest.mark.parametrize("shape", [(7, 5), (64, 64), (33, 100), (1, 9), (11008, 4096)])
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.8, 0.99, 1.0])
def test_the_rank_at_a_ratio_has_that_share_of_the_parameters(shape, ratio):
    rank = rank_at(shape, ratio)
    assert 0 < rank <= min(shape)
    assert rank * (sum(shape) - rank) == pytest.approx(ratio * dense_parameters(shape))


def test_ranks_of_a_square_matrix():
    assert [round(rank_at((1000, 1000), p)) for p in (0.8, 0.6, 0.4)] == [553, 368, 225]  # plain U V: 400, 300, 200


def test_resolve_rank_takes_ints_and_fractions():
    assert resolve_rank(5, (8, 16), "x") == 5
    assert resolve_rank(0.5, (8, 16), "x") == 4
    assert resolve_rank(1.0, (8, 16), "x") == 8
    assert resolve_rank(0.01, (8, 16), "x") == 1


@pytest.mark.parametrize("rank", [0, -3, 9, 1.5, 0.0, float("nan"), True, "4"])
def test_resolve_rank_refuses_the_rest(rank):
    with pytest.raises(RankError, match="x"):
        resolve_rank(rank, (8, 16), "x")


def test_a_rank_that_is_too_large_names_all_there_is_to_know():
    with pytest.raises(RankError) as error:
        resolve_rank(5000, (4096, 11008), "model.layers.0.mlp.down_proj")
    message = "rank 5000 exceeds min(out_features, in_features)=4096 for model.layers.0.mlp.down_proj (4096, 11008); "
    assert str(error.value) == message + "give a lower rank"


@pytest.mark.parametrize("seed", range(20))
def test_param_ratio_spends_the_budget_and_never_more(seed):
    rng = random.Random(seed)
    shapes = [(rng.randrange(32, 900), rng.randrange(32, 900)) for _ in range(rng.randrange(1, 30))]
    ratio = rng.uniform(0.2, 0.95)
    ranks = ranks_for_param_ratio(shapes, ratio)
    dense = sum(o * i for o, i in shapes)
    spent = sum(factored_parameters(s, r) for s, r in zip(shapes, ranks, strict=True))
    assert spent <= ratio * dense
    # What is left is less than the dearest single step that rounding took away.
    assert ratio * dense - spent < max(8 * (o + i) for o, i in shapes) * 2
    for shape, rank in zip(shapes, ranks, strict=True):
        assert 1 <= rank <= min(shape)
        assert abs(rank - rank_at(shape, ratio)) <= 8


def test_large_ranks_are_multiples_of_eight():
    assert all(r % 8 == 0 for r in ranks_for_param_ratio([(2048, 2048), (8192, 2048)] * 5, 0.6))


@pytest.mark.parametrize("ratio", [0, -1, 1.01])
def test_param_ratio_out_of_range(ratio):
    with pytest.raises(RankError, match="param ratio"):
        ranks_for_param_ratio([(8, 8)], ratio)


def test_rank_for_energy_is_the_smallest_that_holds_enough():
    values = [4.0, 2.0, 1.0, 0.0]  # energies 16, 4, 1 of 21
    assert rank_for_energy(values, 16 / 21) == 1
    assert rank_for_energy(values, 0.77) == 2
    assert rank_for_energy(values, 1.0) == 3
