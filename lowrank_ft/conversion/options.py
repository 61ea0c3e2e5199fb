"""How factors are found, and what they are fitted to: the options of ``plan`` and ``convert``.

This file needs Python alone, and it has to stay so: the command line makes its flags of these fields before it
imports anything that takes time.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SELF = "self"
"""Calibration data that the model writes itself."""
_GROUP = "calibration"


def _option(default: Any, help: str, metavar: str | None = None, repeated: bool = False) -> Any:
    facts = {"help": help, "group": _GROUP, "metavar": metavar, "repeated": repeated}
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class CalibrationOptions:
    """What people choose of a calibration. What the options mean is in the fields' metadata.

    Where an option is None, ``effort`` decides (:data:`lowrank_ft.conversion.effort.EFFORTS`).
    """

    effort: str = _option("default", "how much work is done: fast, default or best", "NAME")
    method: str | None = _option(
        None,
        "svd (uses no text), activation (default), or anchored (of --effort best); svd for models that cannot write "
        "text, unless --calibration-data is given",
        "NAME",
    )
    refine_epochs: int | None = _option(
        None, "epochs of training each block to match the dense block (default: 0; best: 1)", "N"
    )
    distill_epochs: float | None = _option(
        None, "epochs of training all factors to match the dense model's output (default: 1; fast: 0)", "N"
    )
    activations_dir: str | None = _option(None, "keep hidden states in files in this folder, to save memory", "DIR")
    allocation: str | None = _option(
        None,
        "how the parameters are distributed over the linears: uniform, energy or loss "
        "(convert: loss with --param-ratio, else uniform)",
        "NAME",
    )
    calibration_data: str | list[str] | None = _option(
        None,
        "a sample of the text or chats your model will see: a text, jsonl or parquet file, a dataset on the Hub, or "
        "self: text, and chats if it has a chat template, that the model writes (default); again for more of them, with "
        "equal shares of the tokens",
        "DATA",
        repeated=True,
    )
    calibration_split: str = _option("train", "split of a dataset on the Hub")
    calibration_config: str | None = _option(None, "configuration of a dataset on the Hub")
    calibration_column: str | None = _option(
        None, "column that holds the text or the chats (default: messages, conversations or text)", "NAME"
    )
    calibration_tokens: int | None = _option(
        None,
        "number of tokens, at most (default: 65536; fast: 16384; best: 262144; distilled encoders: 4 times as many)",
        "N",
    )
    own_share: float | None = _option(
        None,
        "share of the tokens that the model writes itself, so that it does not forget what is not in the calibration "
        "data (default: 0.25; fast: 0)",
        "X",
    )
    calibration_block_size: int | None = _option(
        None, "tokens per sequence, for encoders at most (default: 512, or the limit of the model)", "N"
    )
    seed: int = _option(0, "seed for the choice and order of the calibration data")

    def __post_init__(self) -> None:
        """Refuse what is unknown or out of range."""
        from lowrank_ft.conversion.blockwise import METHODS
        from lowrank_ft.conversion.effort import EFFORTS
        from lowrank_ft.errors import ConfigError, require_choice
        from lowrank_ft.factorization.allocation import ALLOCATIONS

        require_choice("--effort", self.effort, tuple(EFFORTS))
        if len(self.sources) > 1 and SELF in self.sources:
            raise ConfigError(
                f"--calibration-data {SELF} stands beside {next(s for s in self.sources if s != SELF)}; leave it out, and "
                f"give the share that the model writes itself: --own-share {1 / len(self.sources):.2g}"
            )
        if self.method is not None:
            require_choice("--method", self.method, METHODS)
        if self.own_share is not None and not 0 <= self.own_share < 1:
            raise ConfigError(
                f"--own-share is {self.own_share}; it must be at least 0 and below 1 (--calibration-data self: the model "
                "writes all)"
            )
        if self.allocation is not None:
            require_choice("--allocation", self.allocation, ALLOCATIONS)
        for name in ("refine_epochs", "distill_epochs"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be 0 or more")
        if self.activations_dir is not None and not Path(self.activations_dir).is_dir():
            raise ConfigError(f"--activations-dir {self.activations_dir} is no folder; create it first")

    @property
    def sources(self) -> list[str]:
        """The names under ``calibration_data``: files, datasets, or :data:`SELF`, which is the default."""
        data = self.calibration_data
        return [data] if isinstance(data, str) else list(data or [SELF])

    def wants_data(self, writes_text: bool) -> bool:
        """Whether calibration data are needed, by what was asked for or by default.

        Args:
            writes_text: the model can write text to be calibrated on, so that calibration is the default.
        """
        asked = (self.calibration_data, self.refine_epochs, self.distill_epochs, self.activations_dir)
        if self.allocation in ("energy", "loss") or any(asked):  # 0 epochs ask for none
            return True
        if self.method is not None:
            return self.method != "svd"
        return writes_text
