"""The items of the tasks in this folder, for lm-evaluation-harness, which calls this file by its path.

A path in a YAML file would be relative to wherever the command is run; this one is relative to this file.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def load(file: str, **_: Any) -> dict[str, Dataset]:
    """The only split, ``test``, of a JSON Lines file beside this one; the harness also passes the task's metadata."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
