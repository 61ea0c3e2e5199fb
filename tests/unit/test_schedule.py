import math

import pytest

from lowrank_ft.errors import ConfigError
from lowrank_ft.schedule import alpha_at, lr_factor_at


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
