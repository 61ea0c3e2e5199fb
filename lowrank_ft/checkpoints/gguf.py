"""GGUF files, as llama.cpp has them: a dense model of transformers is made of one."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lowrank_ft.checkpoints.models import check_finite
from lowrank_ft.errors import CheckpointError, CheckpointNotFoundError, MissingPackageError, first_line


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """The model with its weights as plain numbers, and the tokenizer that the file holds.

    transformers reads it, and knows which architectures there are.

    Raises:
        MissingPackageError: the package gguf is not installed.
        CheckpointNotFoundError: there is no such file.
        CheckpointError: it is damaged, or of an architecture that transformers does not read.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("reading GGUF files needs the package gguf: pip install gguf") from error
    if not path.is_file():
        raise CheckpointNotFoundError(f"there is no file {path}")
    folder, more = str(path.parent), dict[str, Any]()
    if (packed := getattr(transformers, "GgufConfig", None)) is not None:  # newer releases keep weights packed
        more["quantization_config"] = packed(dequantize=True)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=dtype, **more)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever two parsers stumble over
        raise CheckpointError(
            f"{path} cannot be read ({first_line(error)}); it is damaged, or of an architecture whose GGUF files "
            "transformers does not read"
        ) from error
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    model.eval()
    check_finite(model, path)
    return model, tokenizer
