"""What the plugin cannot serve ends in one clear line, before or while weights are read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_ft
from lowrank_ft.checkpoints.loader import NEWEST_READABLE_FORMAT
from tests.conftest import tiny_gpt2, tiny_llama

JOB = {"prompts": [[1, 5, 9]], "new_tokens": 1}


def changed(folder: Path, target: Path, config: Any = None, weights: Any = None) -> Path:
    """A copy whose ``config.json`` or tensors went through a function."""
    shutil.copytree(folder, target)
    if config:
        content = json.loads((target / "config.json").read_text())
        config(content["quantization_config"])
        (target / "config.json").write_text(json.dumps(content))
    if weights:
        tensors = load_file(target / "model.safetensors")
        weights(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def with_head(target: Path) -> Path:
    model = tiny_llama(hidden_size=64, head_dim=32, tie_word_embeddings=False)
    lowrank_ft.convert(model, rank=8, target_modules=["lm_head", "up_proj"])
    lowrank_ft.save_compact(model, target)
    return target


def gpt2(target: Path) -> Path:
    model = tiny_gpt2()
    lowrank_ft.convert(model, rank=8)
    lowrank_ft.save_compact(model, target)
    return target


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.gate_proj.V.weight"]


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.o_proj.U.weight"
    tensors[name] = tensors[name].T.contiguous()


SAID = {
    "newer": f"this checkpoint has lowrank format version 99, and this code reads up to {NEWEST_READABLE_FORMAT}; "
    "run pip install --upgrade lowrank-ft",
    "quantized": "quantization_config has 'bits', which the vLLM plugin does not know",
    "unknown": "vLLM cannot serve the factored model.layers.0.mlp.experts.up_proj: vLLM's model has no linear of that name. "
    "Serve the dense checkpoint that lowrank-ft merge writes",
    "head": "vLLM cannot serve the factored lm_head: it is run by a ParallelLMHead",
    "gpt2": "vLLM transposes the linears of gpt2 as it reads them",
    "missing": "the checkpoint has no V of model.layers.0.mlp.gate_proj, which config.json lists",
    "transposed": "model.layers.0.self_attn.o_proj.U.weight has shape",
}


@pytest.fixture(scope="session")
def refused(folders, serve, tmp_path_factory) -> dict[str, Any]:
    where = tmp_path_factory.mktemp("refused")
    good = folders["bias"]
    made = {
        "newer": changed(good, where / "newer", config=lambda entry: entry.update(format_version=99)),
        "quantized": changed(good, where / "quantized", config=lambda entry: entry.update(bits=4)),
        "unknown": changed(
            good,
            where / "unknown",
            config=lambda entry: entry["ranks"].update({"model.layers.0.mlp.experts.up_proj": 8}),
        ),
        "head": with_head(where / "head"),
        "gpt2": gpt2(where / "gpt2"),
        "missing": changed(good, where / "missing", weights=drop),
        "transposed": changed(good, where / "transposed", weights=transpose),
    }
    engine = {"max_model_len": 64}
    return serve([{**JOB, "name": name, "folder": str(folder), "engine": engine} for name, folder in made.items()])


@pytest.mark.parametrize("name", SAID)
def test_one_line_says_what_and_why(name, refused):
    error = refused[name].get("error", "it was served")
    lines = [line for line in error.splitlines() if SAID[name] in line]
    assert lines, error
