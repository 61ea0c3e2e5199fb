"""One process at a time at one place, and what is said where a disk refuses."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lowrank_ft.errors import OutputError, first_line


@contextmanager
def exclusive(file: Path, busy: str) -> Iterator[None]:
    """Hold the lock ``file``, whose folder is made if need be; the system lets go of it however the process ends.

    Raises:
        OutputError: another process holds it, and ``busy`` says so; or its folder cannot be written.
    """
    lock = FileLock(file, blocking=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OutputError(busy) from None
    except OSError as error:
        raise OutputError(f"cannot write to {file.parent}: {error.strerror}; choose another --output-dir") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def explain_refused_writes(path: Path, remedy: str) -> Iterator[None]:
    """Where the system refuses a write inside, raise an OutputError that names ``path`` and tells the free space."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.EXDEV):
            raise OutputError(
                f"{path} cannot get its new content ({error.strerror}): it is a mount point, or not on the disk of "
                f"{path.absolute().parent}; name a folder inside it"
            ) from error
        if isinstance(error, OutputError) or not is_write_failure(error):
            raise
        raise refused_write(path, error, remedy) from error


def refused_write(path: Path, error: BaseException, remedy: str) -> OutputError:
    """What to say of it: the path, the system's reason, the free space, the way on."""
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free / 2**30
    return OutputError(f"writing {path} failed ({first_line(error)}); {free:.1f} GiB are free there. {remedy}")


def is_write_failure(error: BaseException) -> bool:
    """A write that the system refused: safetensors wraps the system's error in one of its own."""
    if isinstance(error, SafetensorError):
        return "os error" in str(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
