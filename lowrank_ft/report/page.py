"""HTML of a page that needs nothing but itself: its style is inside, its pictures are data, and it has no scripts.

The templates are in ``templates``. They escape everything that is passed in.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Picture:
    """An image that is its own data, what it shows in words, and what is written below it."""

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Missing:
    """What is not known, and how one gets it."""

    what: str
    how: str = ""


def render(template: str, **parts: Any) -> str:
    """The page that a template makes of its parts."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template(template).render(parts)
