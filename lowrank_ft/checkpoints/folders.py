"""Folders that a command writes: which may be written, and which may be replaced."""

import os
from fnmatch import fnmatch
from pathlib import Path

from lowrank_ft.errors import OutputError


def check_folder(path: Path, overwrite: bool, index: str, parts: tuple[str, ...], what: str) -> None:
    """Refuse, before any work is done, a folder that may not be written.

    Args:
        overwrite: an earlier output may be replaced; any other folder with files in it may not.
        index: the file by which an earlier output is known.
        parts: patterns of all files that it may hold.
        what: its name in messages, in the plural.

    Raises:
        OutputError: the path is a file, or this folder or one above, or has content that may not be replaced.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"--output-dir {path} is a file; name a folder")
    if Path.cwd().is_relative_to(path.resolve()):
        raise OutputError(f"--output-dir {path} is the folder that you are in, or above it; name a new one")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"--output-dir {path} is not empty; name another folder, or add --overwrite to replace it")
    foreign = sorted(p.name for p in path.iterdir() if not any(fnmatch(p.name, part) for part in parts))
    if foreign or not (path / index).is_file():
        problem = f"holds {foreign[0]}" if foreign else f"has no {index}"
        raise OutputError(f"--output-dir {path} {problem}, and --overwrite replaces nothing but {what}; name another")


def check_name(path: Path) -> None:
    """Raise an OutputError for a name that there cannot be, such as one that is too long, or that libraries refuse."""
    try:
        str(path).encode()
        path.lstat()
    except UnicodeEncodeError:
        raise OutputError(f"the name {str(path)[:60]!r} is not UTF-8, which safetensors needs; name another") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"nothing can be called {str(path)[:60]!r}... ({reason}); name another") from None


def where_it_leads(path: Path) -> Path:
    """The folder behind a link, which is what is replaced: it may be on another disk, and the link has to stay."""
    return path.resolve() if path.is_symlink() else path


def check_replaceable(path: Path) -> None:
    """Refuse, before any work is done, a folder beside which none can be made to take its place at the end.

    Raises:
        OutputError: it is a mount point, or the folder above belongs to somebody else.
    """
    real = where_it_leads(path)
    if os.path.ismount(real):
        raise OutputError(
            f"--output-dir {path} is a mount point, and a finished folder cannot take its place; name a folder inside it, "
            f"such as {path / 'model'}"
        )
    above = real.absolute().parent
    if real.exists() and not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(
            f"--output-dir {path} cannot be replaced: no permission in {above}, where the new folder is prepared; name a "
            f"folder inside it, such as {path / 'model'}"
        )


def check_writable(path: Path) -> None:
    """Refuse, before any work is done, a path at which no folder can be made or written.

    Raises:
        OutputError: it, or one above it, is a file, or belongs to somebody else; or there can be none of that name.
    """
    check_name(path)
    path = where_it_leads(path)
    nearest = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not os.path.isdir(nearest):
        raise OutputError(f"the output folder {path} cannot be made: {nearest} is no folder; name another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"the output folder {path} cannot be written: no permission in {nearest}; name another")
