"""Rank allocation against exhaustive search, and what it promises about budgets."""

import itertools
import json
import re

import numpy as np
import pytest
import torch

from lowrank_ft.errors import RankError
from lowrank_ft.factorization.allocation import allocate_ranks
from lowrank_ft.factorization.plan import LinearPlan, Plan, make_plan, reallocate
from lowrank_ft.factorization.ranks import dense_parameters, factored_parameters, rank_at, rank_step
from tests.conftest import tiny_llama


def price(shape, rank):
    return dense_parameters(shape) if rank is None else factored_parameters(shape, rank)


def loss(squares, rank):
    return 0.0 if rank is None else float(np.sum(squares[rank:]))


def spectra(shapes, generator, decay=(0.5, 0.95)):
    """Descending, of different size and decay."""
    return [
        10 ** generator.uniform(-1, 1) * generator.uniform(*decay) ** np.arange(min(s)) * np.sort(
            generator.uniform(0.5, 1, min(s))
        )[::-1]
        for s in shapes
    ]  # fmt: skip


def exhaustive(shapes, squares, budget, ratio, multiple):
    """The smallest total loss of all combinations that fit."""
    offers = [
        [*range(step := rank_step(s, ratio, multiple), min(s), step), None] for s in shapes
    ]  # fmt: skip
    totals = [
        sum(map(loss, squares, ranks))
        for ranks in itertools.product(*offers)
        if sum(map(price, shapes, ranks)) <= budget
    ]
    return min(totals, default=None)


@pytest.mark.parametrize("seed", range(40))
def test_it_loses_little_more_than_the_best_of_all_combinations(seed):
    generator = np.random.default_rng(seed)
    shapes = [tuple(generator.integers(6, 17, 2).tolist()) for _ in range(4)]
    squares = spectra(shapes, generator)
    ratio = float(generator.uniform(0.3, 0.95))
    budget = int(ratio * sum(map(dense_parameters, shapes)))
    best = exhaustive(shapes, squares, budget, ratio, 1)
    if best is None:
        with pytest.raises(RankError):
            allocate_ranks(shapes, squares, budget, ratio, 1)
        return
    ranks = allocate_ranks(shapes, squares, budget, ratio, 1)
    assert sum(map(price, shapes, ranks)) <= budget
    found = sum(map(loss, squares, ranks))
    # A multiplier finds the best of all for the parameters that it spends; what cannot be spent is less than the
    # dearest single step, and buys at most what the next step of some linear would.
    dearest = max(sum(s) for s in shapes)
    bound = exhaustive(shapes, squares, budget - dearest, ratio, 1)
    assert best <= found + 1e-12
    assert bound is None or found <= bound * (1 + 1e-9)


def optimum(shapes, squares, budget):
    """The smallest total loss within the budget, by dynamic programming over parameters spent."""
    best = np.zeros(budget + 1)
    for shape, values in zip(shapes, squares, strict=True):
        spent = np.full(budget + 1, np.inf)
        for rank in [*range(1, min(shape)), None]:
            cost = price(shape, rank)
            if cost <= budget:
                spent[cost:] = np.minimum(spent[cost:], best[: budget + 1 - cost] + loss(values, rank))
        best = spent
    return best[-1]


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.7, 0.9])
def test_it_is_within_two_percent_of_the_optimum(share):
    """Prices are concave in the rank, so losses over prices are not convex, and a multiplier alone misses offers."""
    generator = np.random.default_rng(1)
    shapes = [(40, 40), (40, 24), (24, 64), (40, 40), (32, 32)]
    squares = spectra(shapes, generator, (0.8, 0.97))
    budget = int(share * sum(map(dense_parameters, shapes)))
    ranks = allocate_ranks(shapes, squares, budget, share, 1)
    assert sum(map(price, shapes, ranks)) <= budget
    found, best = sum(map(loss, squares, ranks)), optimum(shapes, squares, budget)
    assert best <= found + 1e-9
    assert found <= 1.02 * best


@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.6, 0.8, 0.97])
def test_budget_and_multiples(ratio):
    generator = np.random.default_rng(2)
    shapes = [(128, 128), (128, 384), (384, 128), (64, 128)] * 6
    squares = spectra(shapes, generator, (0.95, 0.99))
    budget = int(ratio * sum(map(dense_parameters, shapes)))
    ranks = allocate_ranks(shapes, squares, budget, ratio)
    spent = sum(map(price, shapes, ranks))
    assert spent <= budget
    assert budget - spent < max(rank_step(s, ratio) * sum(s) for s in shapes)
    for shape, rank in zip(shapes, ranks, strict=True):
        if rank is not None:
            assert rank % rank_step(shape, ratio) == 0
            assert 0 < rank < min(shape)
    uniform = [max(8, int(rank_at(s, ratio)) // 8 * 8) for s in shapes]
    assert sum(map(loss, squares, ranks)) < sum(map(loss, squares, uniform))


def test_a_linear_that_is_worth_it_stays_dense():
    shapes = [(32, 32)] * 4
    squares = [np.full(32, 5.0), *(0.3 ** np.arange(32) for _ in range(3))]
    ranks = allocate_ranks(shapes, squares, 32 * 32 + 3 * 4 * 60, 0.45)
    assert ranks[0] is None
    assert all(isinstance(r, int) for r in ranks[1:])


def test_a_budget_for_everything_is_the_dense_model():
    shapes = [(16, 16), (16, 24)]
    assert allocate_ranks(shapes, [np.ones(16)] * 2, 16 * 16 + 16 * 24, 1.0) == [None, None]


def test_a_linear_without_a_saving_rank_is_dense_and_is_paid_for():
    shapes = [(1, 32), (32, 32)]
    ranks = allocate_ranks(shapes, [np.ones(1), 0.5 ** np.arange(32)], 32 + 59 * 5, 0.4, 1)
    assert ranks == [None, 5]


@pytest.mark.parametrize("squares", [np.zeros(32), np.full(32, 1e-30), np.full(32, 1e30)])
def test_spectra_of_any_scale(squares):
    ranks = allocate_ranks([(32, 32)] * 3, [squares] * 3, 1500, 0.5)
    assert sum(map(price, [(32, 32)] * 3, ranks)) <= 1500


def test_equal_linears_share_about_evenly():
    shapes, squares = [(128, 128)] * 10, [0.9 ** np.arange(128)] * 10
    budget = int(0.6 * 10 * 128 * 128)
    ranks = allocate_ranks(shapes, squares, budget, 0.6)
    assert max(ranks) - min(ranks) <= 8


@pytest.mark.parametrize("seed", range(12))
def test_too_small_a_budget_names_a_ratio_that_works(seed):
    generator = np.random.default_rng(seed)
    shapes = [(4, 4)] * int(generator.integers(1, 40)) + [(64, 64)] * int(generator.integers(0, 3)) + [(5, 96)]
    squares = [np.ones(min(s)) for s in shapes]
    total = sum(map(dense_parameters, shapes))
    ratio = 0.002
    with pytest.raises(RankError, match=r"a budget of [\d,]+ parameters is below the [\d,]+") as caught:
        allocate_ranks(shapes, squares, int(ratio * total), ratio)
    named = float(re.search(r"smallest feasible param ratio is ([\d.e-]+)", str(caught.value)).group(1))
    assert None not in allocate_ranks(shapes, squares, int(named * total), named)[-1:]
    with pytest.raises(RankError):
        allocate_ranks(shapes, squares, int((named - 2e-4) * total), named - 2e-4)


def random_spectra(plan, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        p.name: torch.rand(min(p.shape), generator=generator, dtype=torch.float64).sort(descending=True).values
        * 0.8 ** torch.arange(min(p.shape))
        for p in plan.linears
    }


def test_reallocate_spends_no_more_and_keeps_what_a_pattern_named():
    plan = make_plan(tiny_llama(), param_ratio=0.6, rank_pattern={"o_proj": 3, r"layers\.1\.mlp\.up_proj": 16})
    new = reallocate(plan, random_spectra(plan))
    assert [p.name for p in new.linears] == [p.name for p in plan.linears]
    assert new.factored_parameters <= plan.factored_parameters
    assert (new.model_parameters, new.rank_pattern) == (plan.model_parameters, plan.rank_pattern)
    for before, after in zip(plan.linears, new.linears, strict=True):
        if "o_proj" in before.name or before.name.endswith("1.mlp.up_proj"):
            assert after == before
    assert new.ranks != plan.ranks
    everything = make_plan(tiny_llama(), rank=4, rank_pattern={".*": 5})
    assert reallocate(everything, {}) == everything


def test_reallocate_gives_the_rank_to_whom_it_is_worth_most():
    plan = make_plan(tiny_llama(), param_ratio=0.6)
    spectra = random_spectra(plan)
    dear = "model.layers.1.mlp.down_proj"
    spectra[dear] = 1e3 * torch.ones(32, dtype=torch.float64)
    new = reallocate(plan, spectra)
    entry = next(p for p in new.linears if p.name == dear)
    assert entry == LinearPlan(dear, (32, 48), None, "worth more dense than factored; kept dense")


def test_an_allocated_plan_is_saved_edited_and_loaded(tmp_path):
    plan = make_plan(tiny_llama(), param_ratio=0.6)
    plan = reallocate(plan, random_spectra(plan, seed=3))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    data = json.loads((tmp_path / "plan.json").read_text())
    data["linears"][2]["rank"] = 2
    data["linears"][3]["rank"] = None
    (tmp_path / "plan.json").write_text(json.dumps(data))
    edited = Plan.load(tmp_path / "plan.json")
    assert edited.linears[2].rank == 2
    assert edited.linears[3].rank is None
    assert edited.linears[4:] == plan.linears[4:]
