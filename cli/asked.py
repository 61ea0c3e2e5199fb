"""What is refused before anything slow is imported: a model that is not there, an output that may not be written."""

import argparse
import os
from pathlib import Path

from lowrank_ft.checkpoints.atomic import check_output_dir
from lowrank_ft.checkpoints.names import check_model_name, local_folder


def check_models(*names: str | None) -> None:
    """Raise a CheckpointNotFoundError for a name of a folder that is not there, or is no model's."""
    for name in names:
        if name is not None:
            check_model_name(name)


def choose_output_dir(options: argparse.Namespace, name: str) -> None:
    """Where the result goes: what was asked for, or a folder here that is called after the model.

    ``meta-llama/Llama-3.2-1B`` becomes ``Llama-3.2-1B-lowrank``.

    Raises:
        OutputError: the folder may not be written.
    """
    if options.output_dir is None:
        options.output_dir = f"{Path(os.path.expanduser(name)).resolve().name}-{options.output_suffix}"
    options.output_dir = os.path.expanduser(options.output_dir)
    check_output_dir(options.output_dir, options.overwrite, keep=local_folder(name))
