"""Items of a task of one's own from local files, for the YAML file of a task of lm-evaluation-harness:

    custom_dataset: !function lowrank_ft.evaluation.task_data.load
    dataset_kwargs:
      data_files:
        test: questions.jsonl

A path in a YAML file is otherwise relative to wherever the command is run.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from lowrank_ft.data.sources import read_rows
from lowrank_ft.errors import DataError


def load(data_files: Mapping[str, str], config_source: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Read the files of a task; the harness calls this.

    Args:
        data_files: for each split a jsonl, json or parquet file: its path, absolute or relative to the YAML file.
            ``$NAME`` and ``${NAME}`` are environment variables.
        config_source: path of the YAML file, from the harness, which also passes the rest of the metadata.

    Raises:
        DataError: there is no such variable or file, or it cannot be read.
    """
    folder = Path(config_source or ".").parent
    return {split: read_rows(str(folder / _expanded(path))) for split, path in data_files.items()}


def _expanded(path: str) -> Path:
    expanded = os.path.expandvars(path)
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise DataError(
            f"the path {path} needs the environment variable {unset[1]}, which is not set; set it to a folder"
        )
    return Path(expanded).expanduser()
