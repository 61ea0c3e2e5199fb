"""How much of a model is kept, and which of its linears: the options of ``plan``, ``convert`` and the recipes.

This file needs Python alone, and it has to stay so: the command line makes its flags of these fields before it
imports anything that takes time.
"""

from dataclasses import dataclass, field, fields
from typing import Any

_KEPT = "size (give one)"
_WHICH = "which linears (default: all in the transformer blocks)"


def _option(default: Any, help: str, group: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "group": group, "metavar": metavar})


@dataclass(frozen=True)
class SizeOptions:
    """The arguments of :func:`lowrank_ft.make_plan` that people choose. What they mean is in the fields' metadata."""

    rank: int | float | None = _option(
        None, "rank of every linear: a whole number, or a fraction of full rank", _KEPT, "N"
    )
    param_ratio: float | None = _option(None, "share of the parameters to keep: 0.6 removes 40 %", _KEPT, "F")
    energy: float | None = _option(None, "share of the squared singular values to keep; reads weights", _KEPT, "F")
    target_modules: str | list[str] | None = _option(
        None, "names or suffixes, as in PEFT; one regular expression for whole names; or all-linear", _WHICH, "NAME"
    )
    exclude_modules: str | list[str] | None = _option(None, "names or suffixes that stay dense", _WHICH, "NAME")
    rank_pattern: dict[str, int | float] | None = _option(
        None, "ranks of linears that differ, as in PEFT: q_proj=64", _WHICH, "PATTERN=N"
    )

    rank_multiple: int = _option(
        8, "with --param-ratio, ranks are multiples of N, for the device's sake; small linears get less", _WHICH, "N"
    )

    def given(self) -> list[str]:
        """Names of the options that are not left alone."""
        return [f.name for f in fields(self) if getattr(self, f.name) not in (f.default, {})]
