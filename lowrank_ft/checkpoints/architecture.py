"""What the config of a checkpoint says about its model: the class, the kind, and all shapes, before weights are read."""

import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from lowrank_ft.checkpoints.configs import refused
from lowrank_ft.checkpoints.files import TensorInfo
from lowrank_ft.checkpoints.format import QUANT_METHOD
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.errors import CheckpointError


def is_compact(config: Any) -> bool:
    """Whether a transformers config describes a checkpoint of this package."""
    entry = getattr(config, "quantization_config", None)
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    return method == QUANT_METHOD


def refuse_quantized(config: Any, name: str) -> None:
    """Raise a CheckpointError where another method has packed the weights of a checkpoint."""
    entry = getattr(config, "quantization_config", None)
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    if method is not None and method != QUANT_METHOD:
        raise CheckpointError(
            f"{name} is quantized ({getattr(method, 'value', method)}), and its weights are no matrices to factorize; "
            "name the model that it was quantized from, or dequantize it first"
        )


def model_class(config: Any, name: str, trust_remote_code: bool = False) -> Any:
    """The class to load a checkpoint with: the one that it was saved from, else the bare ``AutoModel``."""
    architecture = (getattr(config, "architectures", None) or [None])[0]
    if architecture and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code:
        for auto_class, reference in auto_map.items():
            if architecture and str(reference).endswith(f".{architecture}"):
                return getattr(transformers, auto_class)
    elif any(k.startswith("AutoModel") for k in auto_map):
        raise CheckpointError(
            f"{name} needs its own Python code ({architecture}); add --trust-remote-code if you trust its author"
        )
    return transformers.AutoModel


def writes_text(config: Any) -> bool:
    """Whether the checkpoint is a causal language model."""
    architecture = (getattr(config, "architectures", None) or ["none"])[0]
    return bool(architecture.endswith(("ForCausalLM", "LMHeadModel")))


def check_causal_lm(config: Any, source: Source) -> None:
    """Raise a CheckpointError unless the checkpoint is a causal language model, the kind that is fine-tuned here."""
    architecture = (getattr(config, "architectures", None) or ["none"])[0]
    if not writes_text(config):
        raise CheckpointError(
            f"{source.name} is a {architecture}, and this trains causal language models; convert it without "
            "fine-tuning, or train it in your own loop (lowrank_ft.convert, get_peft_model)"
        )


def skeleton(config: Any, name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device: all modules and shapes, no weights."""
    cls = model_class(config, name, trust_remote_code)

    def build(some: Any) -> PreTrainedModel:
        with torch.device("meta"):
            if hasattr(cls, "from_config"):
                return cls.from_config(some, trust_remote_code=trust_remote_code)
            return cls(some)

    try:
        return build(config)
    except Exception as error:  # a value that does not fit is found wherever it is used first
        fields = config.to_diff_dict()
        message = refused(f"{name}: config.json", fields, lambda some: build(type(config).from_dict(some)), error)
        raise CheckpointError(message) from error


def check_headers(model: torch.nn.Module, tensors: dict[str, TensorInfo], where: str) -> None:
    """Compare a model that was built from its config with the headers of the weights, where their names are the same.

    A field that the config lacks has a default, so a model can be built that the weights do not belong to.

    Raises:
        CheckpointError: a weight has another shape, or is missing.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not tensors or not tensors.keys() <= own.keys():  # renamed while it is loaded, or packed by a quantizer
        return
    for name, info in tensors.items():
        if own[name] != info.shape:
            raise CheckpointError(
                f"{where}: config.json describes {name} as {own[name]}, and the weights have it as {info.shape}; a field "
                "is missing or wrong, so download the file again"
            )
    tied = {*(getattr(model, "_tied_weights_keys", None) or {}), *(getattr(model, "all_tied_weights_keys", None) or {})}
    spared = "|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or ["(?!)"])
    missing = [name for name in own if name not in tensors and name not in tied and not re.search(spared, name)]
    if missing:
        raise CheckpointError(
            f"{where}: config.json describes a model of {len(own)} weights, and the first of {len(missing)} that are not "
            f"there is {missing[0]}; a field is missing or wrong, or the checkpoint is incomplete"
        )
