"""PEFT adapters where a whole model is expected: beside the weights of a checkpoint, or inside a model to be saved.

transformers attaches an adapter that it finds beside the weights, and then saves that adapter alone.
"""

import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lowrank_ft.errors import CheckpointError, first_line

ADAPTER_CONFIG = "adapter_config.json"


def check_adapter(name: str, found: bool, wanted: bool) -> None:
    """Raise a CheckpointError where there is an adapter that nobody asked for, or none where one was asked for."""
    if found and not wanted:
        raise CheckpointError(
            f"{name} holds an adapter ({ADAPTER_CONFIG}) beside the weights; merge it with --adapter "
            "(Source(..., adapter=True)), or move it out of the folder"
        )
    if wanted and not found:
        raise CheckpointError(f"{name} has no {ADAPTER_CONFIG}, so there is no adapter to merge; leave --adapter out")


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """A folder of links to all of ``folder`` but its adapter; ``folder`` itself where there is none."""
    if not (folder / ADAPTER_CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lowrank-ft-") as links:
        for entry in folder.iterdir():
            if not entry.name.startswith("adapter_"):
                (Path(links) / entry.name).symlink_to(entry.resolve())
        yield Path(links)


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Multiply the adapter in ``folder`` into the weights of ``model``.

    Raises:
        CheckpointError: it does not fit the model, or holds only a part of itself.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, AttributeError, UserWarning) as error:
        raise CheckpointError(f"the adapter in {folder} does not fit its weights: {first_line(error)}") from error
    # PEFT froze the base model to train the adapter. After the merge all weights can be trained again.
    merged.requires_grad_(True)
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        merged.__dict__.pop(mark, None)
    return merged.eval()


def refuse_adapters(model: nn.Module) -> None:
    """Raise a CheckpointError if the model carries adapters of PEFT, which ``save_pretrained`` would write alone."""
    peft: Any = sys.modules.get("peft")
    if peft is None:
        return
    kinds = (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.other.AuxiliaryTrainingWrapper)
    name = next((n for n, m in model.named_modules() if isinstance(m, kinds)), None)
    if name is not None or isinstance(model, peft.PeftModel | peft.tuners.tuners_utils.BaseTuner):
        raise CheckpointError(
            f"the model carries an adapter of PEFT ({name or type(model).__name__}), and a checkpoint holds a whole "
            "model; save what model.base_model.compact_and_unload() (LOWRANK) or model.merge_and_unload() gives"
        )
