"""The value of an option, from a YAML file or the command line, as the type that the option has."""

import os
from types import UnionType
from typing import Any, get_args

from lowrank_ft.errors import ConfigError
from lowrank_ft.reading import kind_of

_PATHS = (
    "model", "guide_model", "config_name", "tokenizer_name", "dataset", "eval_dataset", "distill_dataset",
    "output_dir", "resume_from_checkpoint",
)  # fmt: skip
_SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def checked(name: str, value: Any, hint: Any, where: str = "") -> Any:
    """``value`` as an option of type ``hint`` has it.

    ``no`` is False in YAML; where it is one of the words that an option takes, it is that word. ``true`` of
    ``resume_from_checkpoint`` is ``auto``. ``~`` in paths is the home folder.

    Args:
        where: begins the message, such as the name of a file.

    Raises:
        ConfigError: it is of another type.
    """
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if name == "report_to":
        value = _trackers(value)
    if name == "mixed_precision" and value is False:
        value = "no"
    if name == "resume_from_checkpoint" and isinstance(value, bool):  # as transformers has it
        value = "auto" if value else None
    if value is None and type(None) in kinds:
        return None
    found = _NOTHING
    for kind in kinds:
        found = _as(kind, value)
        if found is not _NOTHING:
            break
    if found is _NOTHING and isinstance(value, str) and name in ("target_modules", "exclude_modules"):
        found = value  # one regular expression
    if name == "rank_pattern" and isinstance(found, dict):
        for pattern, rank in found.items():
            if _as(float, rank) is _NOTHING or isinstance(rank, str):
                raise ConfigError(f"{where}{name} gives {pattern} {kind_of(rank)}; it must be a number")
    if found is _NOTHING:
        allowed = " or ".join(dict.fromkeys(_ALLOWED[kind] for kind in kinds))
        raise ConfigError(f"{where}{name} is {_shown(value)}; it must be {allowed}")
    return os.path.expanduser(found) if name in _PATHS and isinstance(found, str) else found


_NOTHING = object()
_ALLOWED = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", list[str]: "a list of names",
    dict: "a mapping of names", type(None): "null",
}  # fmt: skip


def _as(kind: Any, value: Any) -> Any:
    """``value`` as this type, or ``_NOTHING``."""
    if kind is bool:
        return _SWITCHES.get(str(value).lower(), _NOTHING) if isinstance(value, bool | str) else _NOTHING
    if isinstance(value, bool) or value is None:
        return _NOTHING
    if kind is str:  # a year or a commit may look like a number
        return str(value) if isinstance(value, str | int) else _NOTHING
    if kind is dict:
        return value if isinstance(value, dict) and all(isinstance(key, str) for key in value) else _NOTHING
    if kind == list[str]:
        return value if isinstance(value, list) and all(isinstance(v, str) for v in value) else _NOTHING
    if kind not in (int, float) or not isinstance(value, int | float | str):
        return _NOTHING
    try:  # 1e-4 is a text in YAML, which wants 1.0e-4
        number = float(value)
        whole = int(value) if isinstance(value, str) and not _fractional(value) else value
    except (ValueError, OverflowError):
        return _NOTHING
    if kind is float:  # a whole number stays one: rank 1 is no fraction
        return whole if isinstance(whole, int) else number
    if isinstance(whole, int):
        return whole
    return int(number) if number.is_integer() else _NOTHING


def _fractional(text: str) -> bool:
    return not text.strip().lstrip("+-").isdigit()


def _trackers(value: Any) -> Any:
    """``none``, as transformers has it, and nothing at all are no trackers; one name is a list of one."""
    if value in (None, False, "none", "no", "", ["none"]):
        return []
    return [value] if isinstance(value, str) else value


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if isinstance(value, str | int | float) and not isinstance(value, bool) else kind_of(value)
