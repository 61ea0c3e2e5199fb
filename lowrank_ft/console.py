"""What people see in a terminal: one-line errors and small tables. Data goes to stdout, everything else to stderr."""

import functools
import os
import select
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import tqdm
import tqdm.auto

from lowrank_ft.errors import LowRankError, first_line

_NO_END = 1_000_000
_SECONDS_BETWEEN_LINES = 60
_SECONDS_TO_BE_ENDED = 5


def one_line_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Turn an error into one line on stderr and exit code 1; ``LOWRANK_FT_DEBUG=1`` keeps tracebacks."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        formatwarning = warnings.formatwarning
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without a line of source
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()  # here, where a closed pipe is expected
            return result
        except Exception as error:
            if isinstance(error, BrokenPipeError) and reader_is_gone():
                sys.exit(1)
            if os.environ.get("LOWRANK_FT_DEBUG"):
                raise
            print_error(error)
            sys.exit(1)
        finally:
            warnings.formatwarning = formatwarning

    return wrapped


def print_error(error: BaseException, debug: str = "LOWRANK_FT_DEBUG=1") -> None:
    """One line on stderr that says which process it is of, unless that is the main one.

    A :class:`LowRankError` is often the same in all processes. So the first one of each machine prints it at once; when
    that has ended, the launcher ends the others there. They wait for this, and what is left after some seconds is the
    error of a process alone, which prints it.
    """
    rank = os.environ.get("RANK", "0")
    if isinstance(error, LowRankError) and os.environ.get("LOCAL_RANK", rank) != "0":
        try:
            time.sleep(_SECONDS_TO_BE_ENDED)
        except KeyboardInterrupt:  # as a command takes the launcher's signal
            return
    print(f"error: {'' if rank == '0' else f'process {rank}: '}{one_line(error, debug)}", file=sys.stderr, flush=True)


def one_line(error: BaseException, debug: str = "LOWRANK_FT_DEBUG=1") -> str:
    """An error for people: ours are sentences; of any other, its type and the first line, and what shows the rest."""
    if isinstance(error, LowRankError):
        return printable(" ".join(str(error).split()))
    return f"{type(error).__name__}: {printable(first_line(error))} ({debug} shows the traceback)"


@contextmanager
def silent_unless(speaks: bool) -> Iterator[None]:
    """Inside, a process that does not speak prints nothing; what it raises is for the caller to show."""
    if speaks:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


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


def progress_bar(iterable: Any = None, *, progress: bool = True, **options: Any) -> Any:
    """tqdm's bar on a terminal. In a log file it is a line each minute, and nothing for work that is shorter.

    Args:
        progress: False for no bar at all.
        options: of tqdm.
    """
    if not progress or sys.stderr.isatty():
        return tqdm.auto.tqdm(iterable, disable=not progress, **options)
    every = _SECONDS_BETWEEN_LINES
    return tqdm.tqdm(
        iterable, disable=False, file=_Lines(), delay=every, mininterval=every, maxinterval=2 * every, **options
    )


class _Lines:
    """stderr, on which a bar that would be drawn over the one before is a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", to_stderr: bool = False
) -> None:
    """A table whose first column is text and whose other columns are numbers, right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=to_stderr)
    if not console.is_terminal:  # a file has no width; a path that is cut in two cannot be searched for
        console = Console(stderr=to_stderr, width=_NO_END)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(Text(printable(column)), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if title:
        console.print(Text(printable(title), style="italic"), soft_wrap=True)
    console.print(table)


def printable(text: str) -> str:
    """What comes from outside, without characters that move the cursor, colour the terminal or have no form."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def reader_is_gone() -> bool:
    """Whether whoever read our output, such as ``head``, has closed it; then nothing more is written, nor complained."""
    try:
        sys.stdout.flush()
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
        if not any(event & select.POLLERR for _, event in watch.poll(0)):
            return False
    except BrokenPipeError:
        pass
    except (OSError, ValueError, AttributeError):  # no file, or a system without poll
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would complain at its end
    return True


def human_bytes(size: float) -> str:
    """``5.66 MB``: decimal units, three digits."""
    return _in_units(size, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_seconds(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def human_count(count: float) -> str:
    """``1.24 B``, ``2.83 M``: three digits."""
    return _in_units(count, ("", "k", "M", "B", "T")).rstrip()


def _in_units(number: float, units: Sequence[str]) -> str:
    """Three digits and the unit; what rounds to 1000 is 1 of the next one."""
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.0f} {unit}" if unit == units[0] else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} {units[-1]}" if number < 999.5 else f"{number:,.0f} {units[-1]}"
