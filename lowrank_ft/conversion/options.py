"""How factors are found, and what they are fitted to: the options of ``plan`` and ``convert``.

This file needs Python alone, and it has to stay so: the command line makes its flags of these fields before it
imports anything that takes time.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_GROUP = "calibration"


def _option(default: Any, help: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "group": _GROUP, "metavar": metavar})


@dataclass(frozen=True)
class CalibrationOptions:
    """What people choose of a calibration. What the options mean is in the fields' metadata.

    None of the number of epochs or tokens is the default of :class:`lowrank_ft.Calibration` or of the data.
    """

    method: str | None = _option(
        None,
        "svd (the weight alone), activation, or anchored (default; svd for models that cannot write text, "
        "unless --calibration-data is given)",
        "NAME",
    )
    refine_epochs: int | None = _option(None, "passes that train each block to match its dense twin (default: 1)", "N")
    distill_epochs: float | None = _option(
        None, "passes that train all factors to match the dense model's output (default: 1)", "N"
    )
    activations_dir: str | None = _option(
        None, "keep hidden states in files there, where memory does not hold them", "DIR"
    )
    allocation: str | None = _option(
        None,
        "how ranks share the parameters: uniform, energy or loss; convert takes loss by default where "
        "--param-ratio says how many there are",
        "NAME",
    )
    calibration_data: str | None = _option(
        None,
        "a text, jsonl or parquet file, a dataset on the Hub, or self: text that the model writes (default)",
        "DATA",
    )
    calibration_split: str = _option("train", "split of a dataset on the Hub")
    calibration_config: str | None = _option(None, "configuration of a dataset on the Hub")
    calibration_column: str = _option("text", "column that holds the text")
    calibration_tokens: int | None = _option(None, "at most so many tokens (default: 262144; of self, 65536)", "N")
    calibration_block_size: int | None = _option(None, "tokens per text (default: 512, or what the model allows)", "N")
    seed: int = _option(0, "choice and order of the calibration data")

    def __post_init__(self) -> None:
        """Refuse what is unknown or out of range."""
        from lowrank_ft.conversion.blockwise import METHODS
        from lowrank_ft.errors import ConfigError, require_choice
        from lowrank_ft.factorization.allocation import ALLOCATIONS

        if self.method is not None:
            require_choice("--method", self.method, METHODS)
        if self.allocation is not None:
            require_choice("--allocation", self.allocation, ALLOCATIONS)
        for name in ("refine_epochs", "distill_epochs"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be 0 or more")
        if self.activations_dir is not None and not Path(self.activations_dir).is_dir():
            raise ConfigError(f"--activations-dir {self.activations_dir} is no folder; make it first")

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
