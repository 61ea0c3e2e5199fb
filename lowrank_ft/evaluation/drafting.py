"""What a compact model is worth as the draft model of its dense original: assisted, or speculative, generation.

The draft proposes ``k`` tokens, and one step of the dense model checks them all, so the output is the dense model's
(Leviathan et al. 2023, arXiv 2211.17192; ``generate(assistant_model=...)`` in transformers). If each token is accepted
with probability ``a``, and a step of the draft takes a share ``c`` of a step of the dense model,

    tokens per step of the dense model     t = (1 - a^(k+1)) / (1 - a)
    speed-up                               t / (k c + 1)

In greedy generation ``a`` is the share of positions at which both models rank the same token first. With one sequence at
a time, memory is what a step waits for, so ``c`` is about the ratio of the models' bytes. It pays where ``c < a``.
"""

from dataclasses import dataclass

from lowrank_ft.errors import ConfigError

MOST_TOKENS = 10


@dataclass(frozen=True)
class Draft:
    """What to expect.

    Attributes:
        acceptance: share of the drafted tokens that the dense model takes, 0 to 1.
        cost: time of a step of the draft, over that of the dense model.
        tokens: how many to draft at a time, for the best speed-up; at most 10.
        speed_up: over the dense model alone; below 1 it is slower.
    """

    acceptance: float
    cost: float
    tokens: int
    speed_up: float


def tokens_per_step(acceptance: float, drafted: int) -> float:
    """Expected tokens that one step of the dense model yields, 1 to ``drafted + 1``."""
    return sum(acceptance**i for i in range(drafted + 1))


def draft(acceptance: float, cost: float) -> Draft:
    """The best number of tokens to draft, and the speed-up that it gives.

    Raises:
        ConfigError: a number is out of range.
    """
    if not 0 <= acceptance <= 1 or not cost > 0:
        raise ConfigError(f"acceptance {acceptance} must be between 0 and 1, and cost {cost} above 0")
    found = {k: tokens_per_step(acceptance, k) / (k * cost + 1) for k in range(1, MOST_TOKENS + 1)}
    best = max(found, key=lambda k: found[k])
    return Draft(acceptance, cost, best, found[best])
