"""Output folders that appear whole or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lowrank_ft.checkpoints.companions import COMPANION_FOLDERS, COMPANIONS
from lowrank_ft.checkpoints.folders import check_folder
from lowrank_ft.errors import OutputError

# --overwrite replaces a folder only where each entry looks like a part of a checkpoint.
_CHECKPOINT_PARTS = (
    *COMPANIONS, *COMPANION_FOLDERS,
    "*.json", "*.safetensors", "README.md", "lowrank_plugin.py", "checkpoints", "metrics.jsonl", "training.png", "rank_map.png",
    "report.html", "[0-9]_*",
)  # fmt: skip


def check_output_dir(path: str | Path, overwrite: bool = False, keep: str | Path | None = None) -> None:
    """Refuse, before any work is done, a folder that may not be written.

    Args:
        overwrite: an earlier output may be replaced; any other folder with files in it may not.
        keep: the source of the conversion, which must not be inside the output.

    Raises:
        OutputError: see :func:`check_folder`; or the path holds ``keep``.
    """
    path = Path(path)
    if keep is not None and Path(keep).exists() and Path(keep).resolve().is_relative_to(path.resolve()):
        raise OutputError(f"--output-dir {path} holds the source {keep}; write somewhere else")
    check_folder(path, overwrite, "config.json", _CHECKPOINT_PARTS, "checkpoints")


@contextmanager
def whole_folder(path: str | Path, overwrite: bool = False, keep_existing: bool = False) -> Iterator[Path]:
    """Write into a hidden folder beside ``path``; it takes the name ``path`` only when the block ends well.

    After an error, a full disk or an interrupt, nothing is left and an earlier folder is as it was.

    Args:
        overwrite: see :func:`check_output_dir`.
        keep_existing: ``path`` is the folder of a run; its other files stay, and ``config.json`` comes last, so that
            nothing can be loaded before everything is there.

    Raises:
        OutputError: see :func:`check_output_dir`; or the disk is full.
    """
    path = Path(path)
    if not keep_existing:
        check_output_dir(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise OutputError(f"cannot write to {path.parent}: {error.strerror}; choose another --output-dir") from error
    try:
        yield draft
        open_permissions(draft)
        if keep_existing and path.exists():
            _move_in(draft, path)
        else:
            _take_place(draft, path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError) or not _is_write_failure(error):
            raise
        free = shutil.disk_usage(path.parent).free / 2**30
        raise OutputError(
            f"writing {path} failed ({error}); {free:.1f} GiB are free there. Nothing was left behind; "
            "free some space or choose another --output-dir"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _move_in(draft: Path, path: Path) -> None:
    for stale in (path / "config.json", *path.glob("model*.safetensors*")):
        stale.unlink(missing_ok=True)  # shards of an earlier export would win over a single new file
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


def _take_place(draft: Path, path: Path) -> None:
    if not path.exists():
        os.replace(draft, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".replaced", dir=path.parent))
    os.replace(path, aside / "old")
    try:
        os.replace(draft, path)
    except BaseException:
        os.replace(aside / "old", path)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _is_write_failure(error: Exception) -> bool:
    """A write that the system refused: safetensors wraps the system's error in one of its own."""
    return not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
