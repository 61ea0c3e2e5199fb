"""Schedules, as pure functions of the global optimizer step.

Nothing here keeps a counter, so a run that is killed and resumed, or run on another number of processes, sees the
same values. ``step`` counts completed optimizer steps: step 0 is the first one.
"""

import math

from lowrank_ft.errors import ConfigError

ALPHA_SCHEDULES = ("cosine", "linear")
LR_SCHEDULES = ("cosine", "linear", "constant")


def alpha_at(step: int, guided_steps: int, schedule: str = "cosine") -> float:
    """Share of the guide at ``step``: 1 at step 0, 0 from ``guided_steps`` on.

    ``cosine`` is half a period, ``(1 + cos(pi * step / guided_steps)) / 2`` (Wei et al. 2024, arXiv 2407.09835);
    ``linear`` is ``1 - step / guided_steps``.

    Raises:
        ConfigError: ``schedule`` is not one of ``ALPHA_SCHEDULES``.
    """
    require_choice("alpha schedule", schedule, ALPHA_SCHEDULES)
    if step >= guided_steps:
        return 0.0
    progress = step / guided_steps
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def lr_factor_at(step: int, total_steps: int, warmup_steps: int = 0, schedule: str = "cosine") -> float:
    """Factor on the peak learning rate at ``step``: linear warm-up, then a decay to 0 at ``total_steps``.

    Raises:
        ConfigError: ``schedule`` is not one of ``LR_SCHEDULES``.
    """
    require_choice("learning-rate schedule", schedule, LR_SCHEDULES)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def require_choice(what: str, found: str, allowed: tuple[str, ...]) -> None:
    """Raise a ConfigError that lists what is allowed unless ``found`` is one of it."""
    if found not in allowed:
        raise ConfigError(f"{what} {found!r} is unknown; choose one of {', '.join(allowed)}")
