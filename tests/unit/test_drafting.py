"""What a draft model is worth: the formula against a simulation, and the real thing."""

import pytest
import torch

import lowrank_ft
from lowrank_ft.errors import ConfigError
from lowrank_ft.evaluation.drafting import draft, tokens_per_step
from tests.conftest import tiny_llama


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9])
def test_tokens_per_step_against_a_simulation(acceptance):
    generator = torch.Generator().manual_seed(0)
    taken = (torch.rand(200_000, 4, generator=generator) < acceptance).long().cumprod(1).sum(1) + 1
    assert tokens_per_step(acceptance, 4) == pytest.approx(taken.double().mean().item(), rel=5e-3)
    assert tokens_per_step(1.0, 4) == 5


def test_it_pays_where_the_draft_costs_less_than_it_is_accepted():
    for acceptance, cost in ((0.3, 0.29), (0.7, 0.69), (0.95, 0.9)):
        assert draft(acceptance, cost).speed_up > 1
        assert draft(acceptance, acceptance + 0.01).speed_up < 1
        assert draft(acceptance, acceptance + 0.01).tokens == 1
    best = draft(0.9, 0.1)
    assert all(best.speed_up >= tokens_per_step(0.9, k) / (k * 0.1 + 1) for k in range(1, 11))
    assert best.tokens > 3


@pytest.mark.parametrize(("acceptance", "cost"), [(1.1, 0.5), (-0.1, 0.5), (0.5, 0)])
def test_what_is_out_of_range(acceptance, cost):
    with pytest.raises(ConfigError, match="must be between 0 and 1"):
        draft(acceptance, cost)


def test_the_output_is_the_dense_models(ids):
    dense, compact = tiny_llama(), tiny_llama()
    lowrank_ft.convert(compact, rank=8)
    alone = dense.generate(ids[:1], max_new_tokens=20, do_sample=False)
    assert not torch.equal(compact.generate(ids[:1], max_new_tokens=20, do_sample=False), alone)
    assert torch.equal(dense.generate(ids[:1], max_new_tokens=20, do_sample=False, assistant_model=compact), alone)
