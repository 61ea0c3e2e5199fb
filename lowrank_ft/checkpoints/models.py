"""Open a checkpoint as a model with all its weights, and check weights: those that were read, and those just written."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from lowrank_ft.checkpoints.adapters import ADAPTER_CONFIG, check_adapter, merge_adapter, without_adapter
from lowrank_ft.checkpoints.architecture import model_class, skeleton
from lowrank_ft.checkpoints.configs import in_one_line
from lowrank_ft.checkpoints.files import read_headers
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.errors import CheckpointError, NonFiniteError, first_line


def load_model(
    source: Source,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    auto_class: Any = None,
    num_labels: int | None = None,
    offload_folder: Path | None = None,
) -> PreTrainedModel:
    """Load a dense or compact checkpoint with all its weights, in evaluation mode.

    Args:
        auto_class: one of transformers' classes with a head that the checkpoint lacks; the caller fills it. By default
            the class is that of the checkpoint, and nothing may be missing.
        num_labels: outputs of that head.
        offload_folder: leave all weights in their files (:mod:`lowrank_ft.checkpoints.on_disk`); here go those that
            transformers does not take as they are stored.

    Raises:
        CheckpointNotFoundError, CheckpointError: as :class:`Source`; or weights are missing from the checkpoint; or an
            adapter lies beside them, and ``source.adapter`` does not say that it is to be merged.
    """
    config = source.load_config()
    source.check_adapter()
    folder = source.download()
    check_adapter(source.name, (folder / ADAPTER_CONFIG).is_file(), source.adapter)
    read_headers(folder)
    if num_labels is not None:
        config.num_labels = num_labels
    cls = auto_class or model_class(config, source.name, source.trust_remote_code)
    extra: dict[str, Any] = {}
    if hasattr(cls, "_model_mapping") and source.trust_remote_code:
        extra["trust_remote_code"] = True
    if offload_folder is not None:
        extra |= {"device_map": {"": "disk"}, "offload_folder": str(offload_folder)}
    try:
        with without_adapter(folder) as weights:
            model, info = cls.from_pretrained(
                str(weights), config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **extra
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever its class raises
        skeleton(source.load_config(), source.name, source.trust_remote_code)  # names a field of the config if it can
        raise CheckpointError(f"{source.name} does not load ({type(error).__name__}: {in_one_line(error)})") from error
    missing = sorted(info["missing_keys"])
    if auto_class is not None:  # of the body, though, nothing may be missing
        missing = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
    if missing:
        raise CheckpointError(
            f"{source.name} lacks {len(missing)} weights of {type(model).__name__}, the first being {missing[0]}; "
            "the checkpoint is incomplete, or its config.json names another architecture"
        )
    if source.adapter:
        model = merge_adapter(model, folder)
    remember_origin(model, source.name, folder)
    return model.to(device) if device else model


def remember_origin(model: PreTrainedModel, name: str, folder: Path) -> None:
    """Note where a model came from, for what is written later: a Hub model, too, is read from a ``folder``."""
    config: Any = model.config
    config._name_or_path = name
    # The Hub's cache keeps each commit in a folder of its name.
    config._commit_hash = folder.name if folder.parent.name == "snapshots" else None


def check_runs(model: PreTrainedModel) -> Exception | None:
    """The error that a forward pass on a few made-up inputs ends in, or None."""
    inputs = {k: v.to(model.device) for k, v in model.dummy_inputs.items() if isinstance(v, torch.Tensor)}
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # whatever a model's forward may raise
        return error
    return None


def check_written(folder: Path, model: PreTrainedModel) -> None:
    """Open what was just written, on the meta device and so without its weights, by the way that everybody loads it.

    Raises:
        CheckpointError: a weight is missing, is of another shape, or belongs to nothing.
    """
    cls: Any = type(model)
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        _, info = cls.from_pretrained(
            str(folder), device_map={"": "meta"}, use_safetensors=True, output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"the written checkpoint does not load, so it was deleted: {first_line(error)}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
    for what in ("missing", "unexpected"):
        if keys := sorted(info[f"{what}_keys"]):
            raise CheckpointError(
                f"the written checkpoint does not load, so it was deleted: {len(keys)} weights of {cls.__name__} are "
                f"{what}, the first being {keys[0]}"
            )


def check_finite(model: torch.nn.Module, where: object = "") -> None:
    """Raise a NonFiniteError that names the first weight with NaN or infinity, and ``where`` it was read from."""
    of = f"{where}: " if where else ""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                f"{of}{name} {tuple(tensor.shape)} holds {bad} NaN or infinite values; "
                "the checkpoint is damaged, download or train it again"
            )
