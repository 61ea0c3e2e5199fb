"""Output folders and files that appear whole or not at all, and survive a power cut once they are announced.

    write    a hidden folder beside the target: .NAME.xxxx.partial, under the lock .NAME.lock
    sync     every file and folder of it, to the disk
    swap     the two folders change names in one step of the system, so that one of them is always there

A run that was killed leaves its hidden folder behind; the next that writes the same target removes it. A file alone is
written in the same way, without a lock.
"""

import ctypes
import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_ft.checkpoints.companions import COMPANION_FOLDERS, COMPANIONS
from lowrank_ft.checkpoints.folders import (
    check_folder,
    check_name,
    check_replaceable,
    check_writable,
    where_it_leads,
)
from lowrank_ft.checkpoints.locks import exclusive, explain_refused_writes
from lowrank_ft.errors import OutputError

# --overwrite replaces a folder only where each entry looks like a part of a checkpoint.
_CHECKPOINT_PARTS = (
    *COMPANIONS, *COMPANION_FOLDERS,
    "config.json", "conversion.json", "run.json", "adapter_config.json", "model.safetensors.index.json",
    "adapter_model.safetensors.index.json", "model*.safetensors", "adapter_model*.safetensors", "README.md",
    "lowrank_plugin.py", "checkpoints", "metrics.jsonl", "training.png", "rank_map.png", "report.html", "[0-9]_[A-Z]*",
)  # fmt: skip


def check_output_dir(path: str | Path, overwrite: bool = False, keep: str | Path | None = None) -> None:
    """Refuse, before any work is done, a folder that may not be written.

    Args:
        overwrite: an earlier output may be replaced; any other folder with files in it may not.
        keep: the source of the conversion, which must not be inside the output.

    Raises:
        OutputError: see :func:`check_folder` and :func:`check_replaceable`; or the path holds ``keep``.
    """
    path = Path(path)
    check_name(path)
    _recover(where_it_leads(path))
    check_replaceable(path)
    if keep is not None and Path(keep).exists() and Path(keep).resolve().is_relative_to(path.resolve()):
        raise OutputError(f"--output-dir {path} holds the source {keep}; write somewhere else")
    check_folder(path, overwrite, "config.json", _CHECKPOINT_PARTS, "checkpoints")
    check_writable(path)


@contextmanager
def whole_folder(path: str | Path, overwrite: bool = False, keep_existing: bool = False) -> Iterator[Path]:
    """Write into a hidden folder beside ``path``; it takes the name ``path`` only when the block ends well.

    A link stays, and what it points to is replaced. After an error, a full disk or an interrupt, nothing is left and an
    earlier folder is as it was.

    Args:
        overwrite: see :func:`check_output_dir`.
        keep_existing: ``path`` is the folder of a run; its other files stay, and ``config.json`` comes last, so that
            nothing can be loaded before everything is there.

    Raises:
        OutputError: see :func:`check_output_dir`; or the disk is full, or the folder cannot get its name.
    """
    path = Path(path)
    if not keep_existing:
        check_output_dir(path, overwrite)
    busy = f"another command is writing {path}; wait for it, or choose another --output-dir"
    remedy = "Nothing was left behind; free some space or choose another --output-dir"
    shown, path = path, where_it_leads(path)
    with exclusive(path.parent / f".{path.name}.lock", busy), explain_refused_writes(shown, remedy):
        for left in _hidden_beside(path, "partial"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        draft = _hidden_folder(path)
        try:
            yield draft
            open_permissions(draft)
            sync(draft)
            if keep_existing and path.exists():
                _move_in(draft, path)
            else:
                take_place(draft, path)
            sync_folder(path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _hidden_beside(path: Path, ending: str) -> list[Path]:
    """The hidden folders of ``path`` alone: those of ``out.v2`` begin with ``.out.``, too."""
    random = "[a-z0-9_]" * 8  # as mkdtemp makes it, which never has a dot
    return list(path.parent.glob(f".{glob.escape(path.name)}.{random}.{ending}"))


def _hidden_folder(path: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise OutputError(f"cannot write to {path.parent}: {error.strerror}; choose another --output-dir") from error


def _move_in(draft: Path, path: Path) -> None:
    for stale in (path / "config.json", *path.glob("model*.safetensors*")):
        stale.unlink(missing_ok=True)  # a single file of an earlier export would win over new shards
    for file in sorted(draft.iterdir(), key=lambda p: p.name == "config.json"):
        target = path / file.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(file, target)


def open_permissions(folder: Path) -> None:
    """What mkdtemp and safetensors make private becomes like any other file: a server may run as another user."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Write a hidden file beside ``path``; it takes the name ``path`` only when the block ends well, and is on the disk then.

    After an error or an interrupt nothing is left, and an earlier file is as it was. A process that is killed leaves
    the hidden file, ``.NAME.xxxx.partial``.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        open_permissions(draft)
        _sync_file(draft)
        os.replace(draft, path)
        sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of text, whole or not at all.

    Raises:
        OutputError: the system refuses, such as where the disk is full.
    """
    try:
        with whole_file(path) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"writing {path} failed ({error.strerror or error}); free some space, or choose another place"
        ) from error


def take_place(draft: Path, path: Path) -> None:
    """Give a finished folder its name, in one step where the system can. What was there is gone, or it is ``draft`` now."""
    if not path.exists():
        os.replace(draft, path)
        return
    if _exchange(draft, path):  # what was there is now the hidden folder, which is removed
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".replaced", dir=path.parent))
    try:
        os.replace(path, aside / "old")
    except OSError:
        aside.rmdir()
        raise
    try:
        os.replace(draft, path)
    except BaseException:
        os.replace(aside / "old", path)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system does not offer that (it is Linux' renameat2)."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), exchange) == 0)


def _recover(path: Path) -> None:
    """Bring back what a run that was killed between its two renames had put aside."""
    for aside in _hidden_beside(path, "replaced"):
        if not path.exists() and (aside / "old").is_dir():
            os.replace(aside / "old", path)
            print(f"note: {path} was restored; a command that was killed had moved it", file=sys.stderr)
        shutil.rmtree(aside, ignore_errors=True)


def sync(folder: Path) -> None:
    """Every file and folder of it, and itself, to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync_file(path)
        else:
            sync_folder(path)
    sync_folder(folder)


def _sync_file(path: Path) -> None:
    """On the disk before it gets its name, or a power cut could leave an empty file of that name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """The names in it to the disk; what they stand for is synced by itself."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a system that opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that syncs no folders
            raise
    finally:
        os.close(handle)
