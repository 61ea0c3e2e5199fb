import math
from itertools import pairwise

import pytest

from lowrank_ft.errors import ConfigError
from lowrank_ft.schedule import (
    alpha_at,
    data_step_at,
    keeps_guide,
    lr_factor_at,
    mean_guide_cost,
    once_repeated_share,
    repeated_steps,
)


def test_cosine_is_half_a_period():
    assert alpha_at(0, 10) == 1.0
    assert alpha_at(5, 10) == pytest.approx(0.5)
    assert alpha_at(3, 10) == pytest.approx((1 + math.cos(0.3 * math.pi)) / 2)


def test_linear():
    assert [alpha_at(k, 4, "linear") for k in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_alpha_falls_to_zero_and_stays_there(schedule):
    values = [alpha_at(k, 7, schedule) for k in range(20)]
    assert values == sorted(values, reverse=True)
    assert values[6] > 0
    assert values[7:] == [0.0] * 13


def test_no_guided_phase_means_zero_from_the_start():
    assert alpha_at(0, 0) == 0.0


def test_unknown_schedule_lists_the_known_ones():
    with pytest.raises(ConfigError, match="'cubic' is unknown; choose one of cosine, linear"):
        alpha_at(0, 4, "cubic")


def test_learning_rate_rises_peaks_and_decays_to_zero():
    values = [lr_factor_at(k, 100, warmup_steps=10) for k in range(101)]
    assert values[:10] == sorted(values[:10])
    assert values[0] > 0
    assert values[10] == 1.0
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[100] == pytest.approx(0.0)
    assert lr_factor_at(55, 100, 10, "linear") == pytest.approx(0.5)
    assert lr_factor_at(99, 100, 10, "constant") == 1.0


def test_the_gate_is_this_hash_and_no_other():
    """Pinned: with another hash, a run that is resumed with a newer release would be another run."""
    found = [[int(keeps_guide(42, step, layer, 0.5)) for layer in range(8)] for step in range(4)]
    assert found == [
        [0, 0, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 0, 1, 0],
        [0, 0, 1, 1, 1, 1, 0, 1],
    ]


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.93])
def test_a_guide_is_kept_with_probability_alpha_in_every_layer_step_and_seed(alpha):
    """Frequencies along each of the three numbers within four standard errors, and neighbours are independent."""
    n = 4000
    error = 4 * math.sqrt(alpha * (1 - alpha) / n)
    for draw in (lambda k: (k, 3, 5), lambda k: (3, k, 5), lambda k: (3, 5, k)):
        kept = [keeps_guide(*draw(k), alpha) for k in range(n)]
        assert sum(kept) / n == pytest.approx(alpha, abs=error)
        both = sum(a and b for a, b in pairwise(kept)) / (n - 1)
        assert both == pytest.approx(alpha**2, abs=2 * error)


def test_the_gate_is_certain_at_both_ends_and_monotone_in_alpha():
    for k in range(300):
        assert keeps_guide(k, k, k, 1.0)
        assert not keeps_guide(k, k, k, 0.0)
        kept = [keeps_guide(0, k, 1, alpha / 10) for alpha in range(11)]
        assert kept == sorted(kept)


def test_mean_cost_of_the_guides():
    assert mean_guide_cost(100, "cosine", "full") == 1.0
    for schedule in ("cosine", "linear"):  # 1, ..., 0 without the last: half of it, and half a step
        assert mean_guide_cost(100, schedule, "stochastic") == pytest.approx(0.5 + 0.5 / 100)
    with pytest.raises(ConfigError, match="guide mode 'some' is unknown; choose one of full, stochastic"):
        mean_guide_cost(100, "cosine", "some")


def test_repeated_steps_spend_what_is_left_and_not_more():
    for guided in (0, 10, 37):
        added = repeated_steps(100, guided, dense=3.0, factored=1.3, guide=1.1)
        cost = 100 * 1.3 + guided * 1.1 + added * 1.3
        assert 300 - 1.3 < cost <= 300


@pytest.mark.parametrize(
    ("share", "dense", "factored", "guide"),
    [
        # FLOPs of whole runs in units of 1e18 from the paper's tables; its code guides FFNs of all blocks but the first.
        (0.30, 1.69, 1.22, 6 * 11 * 2 * 768 * 3072 * 2.2e9 / 1e18),
        (0.40, 15.5, 15.5 * 6.7 / 10.58, 6 * 23 * 2 * 1024 * 4864 * 6.7e9 / 1e18),
        (0.395, 70.3, 70.3 * 14.58 / 23.36, 6 * 23 * 2 * 1536 * 7424 * 14.58e9 / 1e18),
    ],
)
def test_with_the_papers_guided_shares_each_guided_step_is_repeated_once(share, dense, factored, guide):
    guided = round(10_000 * share)
    stochastic = guide * mean_guide_cost(guided, "cosine", "stochastic")
    assert repeated_steps(10_000, guided, dense, factored, stochastic) == pytest.approx(guided, rel=0.03)
    assert once_repeated_share(dense, factored, stochastic) == pytest.approx(share, rel=0.03)


def test_the_share_for_one_repetition_spends_what_the_dense_run_does():
    guided = 10_000 * once_repeated_share(3.0, 1.3, 1.1)
    assert 10_000 * 1.3 + guided * (1.1 + 1.3) == pytest.approx(30_000)
    assert once_repeated_share(3.0, 0.2, 0.1) == 1.0
    assert once_repeated_share(3.0, 3.1, 2.0) == 0.0


def test_a_guided_run_that_costs_more_than_the_dense_one_is_refused_with_what_would_fit():
    message = r"costs 1\.32 times .* lower guided_ratio to at most 0\.42 or choose smaller ranks, or set guide_mode"
    with pytest.raises(ConfigError, match=message):
        repeated_steps(100, 100, dense=3.0, factored=2.3, guide=1.65)
    assert repeated_steps(100, 42, dense=3.0, factored=2.3, guide=1.65) == 0
    with pytest.raises(ConfigError, match=r"repeated step; choose smaller ranks, or"):
        repeated_steps(100, 10, dense=3.0, factored=3.1, guide=2.0)


def test_added_steps_see_the_guided_data_again_in_order():
    assert [data_step_at(k, 6, 2) for k in range(11)] == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 0]
    assert [data_step_at(k, 6, 4) for k in range(8)] == [0, 1, 2, 3, 4, 5, 0, 1]
