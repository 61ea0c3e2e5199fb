"""Load what is ready to export: a checkpoint of our trainer, a PEFT adapter, or a compact checkpoint."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from lowrank_ft.checkpoints import sharded as tensor_files
from lowrank_ft.checkpoints.architecture import is_compact, model_class
from lowrank_ft.checkpoints.configs import in_one_line
from lowrank_ft.checkpoints.files import RUN_FILE
from lowrank_ft.checkpoints.models import check_finite, load_model
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.errors import CheckpointError, CheckpointNotFoundError, first_line
from lowrank_ft.nn.unfolded import folded_state
from lowrank_ft.reading import kind_of, read_object

_HEADS = {  # of PEFT's task types: the class, and how the weight is called whose rows are the labels
    "SEQ_CLS": ("AutoModelForSequenceClassification", ("score.weight", "classifier.weight", "out_proj.weight")),
    "TOKEN_CLS": ("AutoModelForTokenClassification", ("score.weight", "classifier.weight")),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", ("qa_outputs.weight",)),
}
_GUIDE = (".guide.weight", ".guide.absmax")


def load_training_checkpoint(folder: Path, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any, Path]:
    """The compact model of ``checkpoints/step-N``, its base model's name, and the folder with the tokenizer.

    A checkpoint of the guided phase loses its guides: the compact model is what is left at alpha = 0.

    Raises:
        CheckpointError: the weights are corrupt or do not fit the config beside them.
    """
    config = Source(str(folder), trust_remote_code=trust_remote_code).load_config()
    tensors = {k: v for k, v in tensor_files.read(folder, "model").items() if not k.endswith(_GUIDE)}
    tensors = fold_adapters(tensors, _adapter_scale(folder))
    entry = getattr(config, "quantization_config", None) or {}
    tensors = folded_state(tensors, (entry if isinstance(entry, dict) else entry.to_dict()).get("ranks") or ())
    cls: Any = model_class(config, str(folder), trust_remote_code)
    dtype = next(v.dtype for v in tensors.values() if v.is_floating_point())
    model, info = cls.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise CheckpointError(f"{folder} lacks {sorted(info['missing_keys'])[0]}; it is not a whole checkpoint")
    run = _folder_of_run(folder)
    if (run / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(str(run))
    check_finite(model, folder)
    if (run / RUN_FILE).is_file():
        model.to(_dtype(run / RUN_FILE))
    return model, model.config.quantization_config.base_model, run


def _folder_of_run(folder: Path) -> Path:
    """The folder with tokenizer and dtype: the run's, two levels up, or the checkpoint's own where it was moved."""
    run = folder.resolve().parent.parent
    return run if (run / RUN_FILE).is_file() else folder


def _dtype(path: Path) -> torch.dtype:
    name = read_object(path, CheckpointError).get("export_dtype")
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{path}: export_dtype is {name!r:.60}; it must be a dtype of torch, such as bfloat16")
    return found


def _adapter_scale(folder: Path) -> float:
    """``lora_alpha / lora_r`` of the run, where it trained adapters on the factors."""
    path = folder / "trainer_state.json"
    # transformers.Trainer writes a file of the same name.
    run = read_object(path, CheckpointError, nan=True).get("must_match", {})
    if not isinstance(run, dict):
        raise CheckpointError(f"{path}: must_match is {kind_of(run)}; it must be an object")
    if run.get("trainable") != "lora":
        return 1.0
    alpha, rank = run.get("lora_alpha"), run.get("lora_r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(
            f"{path}: lora_alpha is {alpha!r:.60} and lora_r {rank!r:.60}; both must be positive numbers"
        )
    return float(alpha / rank)


def _base_of_adapter(source: Source, task: str | None, folder: Path) -> PreTrainedModel:
    """The base model with the head of the task, whose weights the adapter brings."""
    if task not in _HEADS:
        return load_model(source)
    path = folder / "adapter_model.safetensors"
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({first_line(error)}); copy it again") from error
    with file:
        names = [n for n in file.keys() if n.endswith(_HEADS[task][1])]  # noqa: SIM118 (safe_open is no mapping)
        labels = file.get_slice(names[0]).get_shape()[0] if names else None
    if labels is None:
        raise CheckpointError(
            f"{folder} is an adapter for {task} and holds no trained head ({' or '.join(_HEADS[task][1])}); "
            "train it with modules_to_save, which get_peft_model sets by itself for this task"
        )
    return load_model(source, auto_class=getattr(transformers, _HEADS[task][0]), num_labels=labels)


def _needs_code(source: Source) -> bool:
    fields: dict[str, Any] = PreTrainedConfig.get_config_dict(source.name, revision=source.revision)[0]
    own = [name for name in fields.get("architectures") or [""] if not hasattr(transformers, name)]
    return bool(own and fields.get("auto_map"))


def load_adapter(
    folder: Path, trust_remote_code: bool = False, base_model: str | None = None
) -> tuple[PreTrainedModel, str, Path]:
    """The compact model of a PEFT adapter of type LOWRANK, its base model's name, and that model's folder.

    Args:
        trust_remote_code: run Python code of a base model that the caller names; never of one that only the adapter names.
        base_model: folder or Hub id of the base model; None for what ``adapter_config.json`` names.

    Raises:
        CheckpointError: the adapter is of another type, or its base model needs code that may not be run.
        CheckpointNotFoundError: its base model is not named or not there.
    """
    from peft import PeftModel

    entry = read_object(folder / "adapter_config.json", CheckpointError)
    if entry.get("peft_type") != "LOWRANK":
        raise CheckpointError(
            f"{folder} is a {entry.get('peft_type')} adapter; export takes LOWRANK ones "
            "(merge the other into its base model, then convert that)"
        )
    name = base_model or entry.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointNotFoundError(f"{folder}/adapter_config.json names no base model; name it with --base-model")
    if base_model is None:  # an adapter may name any repository
        source = Source(name, entry.get("revision"))
    else:
        source = Source(name, None, trust_remote_code)
    try:
        base = _base_of_adapter(source, entry.get("task_type"), folder)
    except CheckpointError as error:
        if base_model is None and _needs_code(source):
            raise CheckpointError(
                f"{name}, which {folder}/adapter_config.json names as its base model, needs its own Python code; if you "
                f"trust its author, name it yourself: --base-model {name} --trust-remote-code"
            ) from error
        raise
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model: Any = PeftModel.from_pretrained(base, str(folder))
        compact = model.base_model.compact_and_unload()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever PEFT stumbles over in the two files
        raise CheckpointError(
            f"the adapter in {folder} does not load: adapter_config.json or adapter_model.safetensors is damaged, or of "
            f"another base model ({type(error).__name__}: {in_one_line(error)})"
        ) from error
    check_finite(compact, folder)
    own_tokenizer = (folder / "tokenizer_config.json").is_file()  # with a chat template of its own, perhaps
    return compact, name, folder if own_tokenizer else source.download()


def load_compact(folder: Path, trust_remote_code: bool = False) -> tuple[PreTrainedModel, str | None, Path]:
    """A compact checkpoint, to be written in another form: the model, its base model's name, and the folder itself.

    Raises:
        CheckpointError: it is dense.
    """
    source = Source(str(folder), trust_remote_code=trust_remote_code)
    if not is_compact(source.load_config()):
        raise CheckpointError(f"{folder} is dense; export takes what training left, or a compact checkpoint")
    model: Any = load_model(source)
    check_finite(model, folder)
    return model, model.config.quantization_config.base_model, folder


def fold_adapters(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state dict that :func:`merge_adapters` would leave, from that of a training checkpoint with adapters.

    Args:
        scale: ``lora_alpha / lora_r`` of the run; 1 for ``leading``.
    """
    base, down, up = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"
    folded = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(base)
        if name.endswith(base) and stem + down in tensors:
            product = tensors[stem + up].float() @ tensors[stem + down].float()
            folded[stem + ".weight"] = (tensor.float() + scale * product).to(tensor.dtype)
        elif not name.endswith((down, up)):
            folded[name] = tensor
    return folded
