"""What people see in a terminal: one-line errors and small tables. Data goes to stdout, everything else to stderr."""

import functools
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowrank_ft.errors import LowRankError


def one_line_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a :class:`LowRankError` into one line on stderr and exit code 1; ``LOWRANK_FT_DEBUG=1`` keeps tracebacks."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except LowRankError as error:
            if os.environ.get("LOWRANK_FT_DEBUG"):
                raise
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    return wrapped


def shown_command(program: str, arguments: Sequence[str]) -> str:
    """A command line to put on record and to publish.

    Secrets are left out, with the options that hold them. Paths lose their folders, which mean nothing elsewhere, and
    would tell whose machine it was.
    """
    shown: list[str] = []
    left_out = False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--") and (left_out := flag.lower().endswith(_SECRETS)):
            left_out = not equals  # then the secret is the next argument
            continue
        if left_out or (value or argument).startswith("hf_"):
            left_out = False
            continue
        shown.append(f"{flag}={_public(value)}" if flag.startswith("--") and equals else _public(argument))
    return shlex.join([program, *shown])


_SECRETS = ("token", "secret", "password", "key")


def _public(value: str) -> str:
    outside = value.startswith(("/", "~", "../")) or Path(value).is_absolute()
    return Path(value).name if outside else value


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", to_stderr: bool = False
) -> None:
    """A table whose first column is text and whose other columns are numbers, right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console = Console(stderr=to_stderr, width=120)
    console.print(table)


def human_bytes(size: float) -> str:
    """``5.66 MB``: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def human_count(count: float) -> str:
    """``1.24 B``, ``2.83 M``: three digits."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f}"
