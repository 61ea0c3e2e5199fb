"""What the name of a model means: a folder here, or a repository on the Hub.

This needs Python alone, so that a misspelt name is refused before anything that takes seconds is imported.
"""

import os
import re
from difflib import get_close_matches
from pathlib import Path

from lowrank_ft.errors import CheckpointNotFoundError


def local_folder(name: str) -> Path | None:
    """The folder of this name, or None for a Hub id."""
    path = Path(os.path.expanduser(name))  # that of Path fails where there is no such user
    return path if os.path.isdir(path) else None  # False also for a name that is too long


def is_hub_id(name: str | None) -> bool:
    """Whether a name can be one on the Hub, and is no folder here, which would mean nothing to anybody else."""
    return bool(name) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name or "") is not None and not Path(name or "").exists()


def check_model_name(name: str) -> Path | None:
    """The folder of a model, which has a ``config.json``; None for what may be a Hub id.

    Raises:
        CheckpointNotFoundError: the folder holds no model; the name is that of a file; or it can be no Hub id, and there is
            no such folder.
    """
    try:
        name.encode()
    except UnicodeEncodeError:  # a folder may be called by any bytes
        raise CheckpointNotFoundError(
            f"the name {name[:60]!r} is not UTF-8, which safetensors needs; rename the folder"
        ) from None
    folder = local_folder(name)
    if folder is not None:
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise CheckpointNotFoundError(f"{folder} has no config.json (found {found}); name a model folder")
        return folder
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        remedy = "name the folder of the model, or its Hub id"
        if path.suffix.lower() == ".gguf":
            remedy = f"make a dense checkpoint of it first: lowrank-ft merge {path} --output-dir FOLDER"
        raise CheckpointNotFoundError(f"{path} is a file; {remedy}")
    # A Hub id is `model` or `name/model`, whatever folders there are here; anything else means a path.
    if name.startswith((".", "/", "~")) or len(path.parts) > 2:
        raise CheckpointNotFoundError(
            f"there is no folder {path}{near_miss(name)}; check the path, or give a Hub id (name/model)"
        )
    return None


def near_miss(name: str) -> str:
    """What to add where nothing has this name: that its folder is here, and what in it is called nearly so; or nothing."""
    path = Path(os.path.expanduser(name))
    if len(path.parts) < 2:
        return ""
    try:
        there = sorted(os.listdir(path.parent))
    except OSError:  # there is no such folder, or it may not be read
        return ""
    near = get_close_matches(path.name, there, 1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f" (the folder {path.parent} has no {path.name}{hint})"
