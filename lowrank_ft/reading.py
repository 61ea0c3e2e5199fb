"""Files that somebody else wrote: what cannot be read, and what is no mapping, ends in one sentence that names the file."""

import json
from pathlib import Path
from typing import Any, NoReturn

from lowrank_ft.errors import LowRankError, first_line

MOST_NESTED = 100
_MOST_BYTES = 256 * 2**20


def read_text(path: str | Path, error: type[LowRankError], what: str = "") -> str:
    """The text of a file, or an ``error`` that names it; ``what`` comes before the name."""
    named = f"{what} {path}".strip()
    path = Path(path).expanduser()
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise error(f"{named} has {size} bytes, too many for settings; name the right file")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as found:
        raise error(f"{named} is not UTF-8 text (byte {found.start}); save it as UTF-8") from None
    except (OSError, ValueError) as found:  # a name with a null byte is a ValueError
        if isinstance(found, error) and isinstance(found, LowRankError):
            raise
        raise error(f"cannot read {named}: {getattr(found, 'strerror', None) or first_line(found)}") from None


def read_object(path: Path, error: type[LowRankError], nan: bool = False) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        error: the class of what is raised.
        nan: ``NaN`` may stand for a number; Python writes it, JSON does not know it.

    Raises:
        LowRankError: it cannot be read, is no JSON, no object, or nested without end.
    """
    text = read_text(path, error)

    def constant(name: str) -> float:
        if name == "NaN" and not nan:
            raise ValueError("it holds NaN, which is no number")
        return float(name)

    try:
        found = json.loads(text, parse_constant=constant)
    except ValueError as problem:
        raise error(f"{path} is no valid JSON: {first_line(problem)}") from None
    except RecursionError:
        found = _too_deep(path, error)
    if not isinstance(found, dict):
        raise error(f"{path} holds {kind_of(found)}; it must be an object, {{...}}")
    if _depth(found) > MOST_NESTED:
        _too_deep(path, error)
    return found


def read_yaml(path: str | Path, error: type[LowRankError], what: str) -> dict[Any, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    Raises:
        LowRankError: it cannot be read, is no YAML, no mapping, or nested without end.
    """
    import yaml

    text = read_text(path, error, what)
    try:
        found = yaml.safe_load(text)
    except RecursionError:
        found = _too_deep(f"{what} {path}", error)
    except (yaml.YAMLError, ValueError, TypeError) as problem:  # a date of month 13, a list as a key
        raise error(f"{what} {path} is no valid YAML: {first_line(problem)}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise error(f"{what} {path} must hold `name: value` lines")
    return found


def kind_of(value: Any) -> str:
    """What a value of JSON or YAML is, in words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)


def _too_deep(path: object, error: type[LowRankError]) -> NoReturn:
    raise error(f"{path} is nested too deep; no file of this kind has more than {MOST_NESTED} levels") from None


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion and no further than matters."""
    level, depth = [value], 0
    while level and depth <= MOST_NESTED:
        level = [c for v in level if isinstance(v, dict | list) for c in (v.values() if isinstance(v, dict) else v)]
        depth += 1
    return depth
