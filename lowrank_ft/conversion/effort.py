"""How much work a conversion does: three points of the measured curve of quality against time (docs/benchmarks.md).

This file needs Python alone: the command line shows the names before it imports anything that takes time.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """What ``--effort`` stands for; each of these has an option of its own, which wins.

    Attributes:
        method: how factors are found.
        tokens: of calibration data, at most. Distillation sees each once.
        fit_tokens: the first of them, for regression and refinement.
        own_share: of the tokens, as many are written by the model itself; 0 for none.
        refine_epochs, distill_epochs: passes of training.
    """

    method: str
    tokens: int
    fit_tokens: int
    own_share: float
    refine_epochs: int
    distill_epochs: float


EFFORTS = {
    "fast": Effort("activation", 16_384, 16_384, 0.0, 0, 0.0),
    "default": Effort("activation", 65_536, 32_768, 0.25, 0, 1.0),
    "best": Effort("anchored", 262_144, 65_536, 0.25, 1, 1.0),
}

ENCODER_TOKENS = 4
"""Times as many where an encoder of text is distilled: it has no vocabulary to predict, so a token costs it little."""
