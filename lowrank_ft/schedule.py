"""Schedules, as pure functions of the global optimizer step.

Nothing here keeps a counter or draws from a random stream, so a run that is killed and resumed, or run on another
number of processes, sees the same values. ``step`` counts completed optimizer steps: step 0 is the first one.
"""

import hashlib
import math

from lowrank_ft.errors import ConfigError, require_choice

ALPHA_SCHEDULES = ("cosine", "linear")
LR_SCHEDULES = ("cosine", "linear", "constant")
GUIDE_MODES = ("full", "stochastic")


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


def keeps_guide(seed: int, step: int, layer: int, alpha: float) -> bool:
    """Stochastic guidance: whether this layer computes its guide in this optimizer step, with probability ``alpha``.

    A hash of the three numbers, taken as a fraction of its range, is below ``alpha`` or not. It is the same on every
    process, machine and release of Python, whatever ran before. At alpha 1 the answer is always yes, at 0 always no.

    Args:
        layer: position among the guided layers of the model, in module order. Names would change with every wrapper.
    """
    return hash_fraction(f"{seed}/{step}/{layer}".encode()) < alpha


def hash_fraction(data: bytes) -> float:
    """A hash of ``data`` as a fraction, 0 to below 1: a draw that is the same everywhere and always."""
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53  # 53 bits: all that a float holds, so never 1.0


def mean_guide_cost(guided_steps: int, schedule: str, mode: str) -> float:
    """Share of the guides that a step of the guided phase computes, on average: the mean alpha if stochastic, else 1.

    Raises:
        ConfigError: ``mode`` is not one of ``GUIDE_MODES``.
    """
    require_choice("guide mode", mode, GUIDE_MODES)
    if mode == "full":
        return 1.0
    return sum(alpha_at(k, guided_steps, schedule) for k in range(guided_steps)) / max(1, guided_steps)


def repeated_steps(steps: int, guided_steps: int, dense: float, factored: float, guide: float) -> int:
    """How many unguided steps to add so that a run costs what dense training of ``steps`` steps does.

    With ``n`` steps, ``g`` of them guided, the largest whole ``m`` in ::

        n * factored + g * guide + m * factored <= n * dense

    Wei et al. 2024 (arXiv 2406.16450) choose ``g`` such that ``m = g``, see :func:`once_repeated_share`.

    Args:
        dense: cost of one step of the dense model.
        factored: of one step of the factors alone.
        guide: what the guides add to that in a guided step, on average.

    Raises:
        ConfigError: the guided run alone costs more than the dense one.
    """
    left = steps * (dense - factored) - guided_steps * guide
    if left < 0:
        cost = (steps * factored + guided_steps * guide) / (steps * dense)
        longest = max(0.0, (dense - factored) / guide)
        advice = f"lower guided_ratio to at most {math.floor(100 * longest) / 100:g}" if longest >= 0.01 else ""
        advice = " or ".join(filter(None, (advice, "choose smaller ranks")))
        raise ConfigError(
            f"fixed_flops: the guided run costs {cost:.2f} times the FLOPs of dense training without any repeated "
            f"step; {advice}, or set guide_mode stochastic, which computes fewer guides"
        )
    return int(left // factored)


def once_repeated_share(dense: float, factored: float, guide: float) -> float:
    """The guided share of a run of dense training's FLOPs in which every guided step is repeated once, 0 to 1.

    With ``g = m`` in the formula of :func:`repeated_steps`::

        g / n = (dense - factored) / (factored + guide)

    Past 1 there would be more to repeat than there are steps, as where the factors are very thin.
    """
    return min(1.0, max(0.0, dense - factored) / (factored + guide))


def data_step_at(step: int, planned_steps: int, guided_steps: int) -> int:
    """The step whose data ``step`` sees: its own, and past ``planned_steps`` those of the guided phase again, in order.

    If more steps are added than were guided, the guided phase's data come round once more.
    """
    return step if step < planned_steps else (step - planned_steps) % guided_steps


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
