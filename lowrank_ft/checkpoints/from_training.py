"""Load what training left behind, ready to export: a checkpoint of our trainer, or a PEFT adapter."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lowrank_ft.checkpoints import sharded as tensor_files
from lowrank_ft.checkpoints.source import RUN_FILE, Source, load_model, model_class
from lowrank_ft.errors import CheckpointError, CheckpointNotFoundError

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
    cls: Any = model_class(config, str(folder), trust_remote_code)
    dtype = next(v.dtype for v in tensors.values() if v.is_floating_point())
    model, info = cls.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise CheckpointError(f"{folder} lacks {sorted(info['missing_keys'])[0]}; it is not a whole checkpoint")
    run = _folder_of_run(folder)
    if (run / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(str(run))
    if (run / RUN_FILE).is_file():
        model.to(getattr(torch, json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["export_dtype"]))
    return model, model.config.quantization_config.base_model, run


def _folder_of_run(folder: Path) -> Path:
    """The folder with tokenizer and dtype: the run's, two levels up, or the checkpoint's own where it was moved."""
    run = folder.resolve().parent.parent
    return run if (run / RUN_FILE).is_file() else folder


def _adapter_scale(folder: Path) -> float:
    """``lora_alpha / lora_r`` of the run, where it trained adapters on the factors."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    run = state.get("must_match", {})  # transformers.Trainer writes a file of the same name
    return float(run["lora_alpha"] / run["lora_r"]) if run.get("trainable") == "lora" else 1.0


def _base_of_adapter(source: Source, task: str | None, folder: Path) -> PreTrainedModel:
    """The base model with the head of the task, whose weights the adapter brings."""
    if task not in _HEADS:
        return load_model(source)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = [n for n in file.keys() if n.endswith(_HEADS[task][1])]  # noqa: SIM118 (safe_open is no mapping)
        labels = file.get_slice(names[0]).get_shape()[0] if names else None
    if labels is None:
        raise CheckpointError(
            f"{folder} is an adapter for {task} and holds no trained head ({' or '.join(_HEADS[task][1])}); "
            "train it with modules_to_save, which get_peft_model sets by itself for this task"
        )
    return load_model(source, auto_class=getattr(transformers, _HEADS[task][0]), num_labels=labels)


def load_adapter(folder: Path, trust_remote_code: bool = False) -> tuple[PreTrainedModel, str, Path]:
    """The compact model of a PEFT adapter of type LOWRANK, its base model's name, and that model's folder.

    Raises:
        CheckpointError: the adapter is of another type.
        CheckpointNotFoundError: its base model is not named or not there.
    """
    from peft import PeftModel

    entry = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if entry.get("peft_type") != "LOWRANK":
        raise CheckpointError(
            f"{folder} is a {entry.get('peft_type')} adapter; export takes LOWRANK ones "
            "(merge the other into its base model, then convert that)"
        )
    name = entry.get("base_model_name_or_path")
    if not name:
        raise CheckpointNotFoundError(f"{folder}/adapter_config.json names no base model; add base_model_name_or_path")
    source = Source(name, entry.get("revision"), trust_remote_code)
    model: Any = PeftModel.from_pretrained(_base_of_adapter(source, entry.get("task_type"), folder), str(folder))
    own_tokenizer = (folder / "tokenizer_config.json").is_file()  # with a chat template of its own, perhaps
    return model.base_model.compact_and_unload(), name, folder if own_tokenizer else source.download()


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
