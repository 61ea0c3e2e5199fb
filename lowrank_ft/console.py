"""What people see in a terminal: one-line errors and small tables. Data goes to stdout, everything else to stderr."""

import functools
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowrank_ft.errors import LowRankError, first_line


def one_line_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Turn an error into one line on stderr and exit code 1; ``LOWRANK_FT_DEBUG=1`` keeps tracebacks.

    A :class:`LowRankError` is the same in all processes of a run, so the first one prints it; any other may be that
    of one process only, which then says so.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except Exception as error:
            if os.environ.get("LOWRANK_FT_DEBUG"):
                raise
            rank = os.environ.get("RANK", "0")
            if rank == "0":
                print(f"error: {one_line(error)}", file=sys.stderr)
            elif not isinstance(error, LowRankError):
                print(f"error: process {rank}: {one_line(error)}", file=sys.stderr)
            sys.exit(1)

    return wrapped


def one_line(error: BaseException) -> str:
    """An error for people: ours are sentences; of any other, its type and the first line."""
    if isinstance(error, LowRankError):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {first_line(error)} (LOWRANK_FT_DEBUG=1 shows the traceback)"


def shown_command(program: str, arguments: Sequence[str]) -> str:
    """A command line to put on record: absolute paths lose their folders, which mean nothing elsewhere."""
    return shlex.join([program, *(Path(a).name if Path(a).is_absolute() else a for a in arguments)])


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
