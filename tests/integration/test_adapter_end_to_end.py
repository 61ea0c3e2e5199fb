"""``--adapter``: an adapter that lies beside the weights is merged first, whatever the command does then."""

import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowrank_ft
from lowrank_ft.checkpoints.models import load_model
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.export import save_compact
from recipes import finetune
from tests.conftest import DEMO_MODEL


def add_lora(folder, targets):
    """Put an adapter beside the weights in ``folder``; returns the model with it."""
    torch.manual_seed(1)
    model = load_model(Source(str(folder)), torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    adapted.save_pretrained(folder)
    return adapted


@pytest.fixture
def train(tmp_path, monkeypatch, fresh_accelerate):
    (tmp_path / "plays.txt").write_text("Enter HAMLET. To be, or not to be, that is the question.\n" * 60)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def train(model, output, *flags):
        options = {
            "model": model, "output_dir": output, "dataset": tmp_path / "plays.txt", "param_ratio": 0.6, "method": "svd",
            "block_size": 32, "max_steps": 2, "guided_ratio": 0.5, "eval_ratio": 0, "eval_steps": 0,
        }  # fmt: skip
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments, *flags])
        finetune.main()
        return output

    return train


def test_finetune_starts_from_the_merged_model(train, tmp_path, capsys):
    both, merged = tmp_path / "both", tmp_path / "merged"
    shutil.copytree(DEMO_MODEL, both)
    shutil.copytree(DEMO_MODEL, merged)
    add_lora(both, ["q_proj", "up_proj"]).merge_and_unload().to(torch.float32).save_pretrained(merged)
    with pytest.raises(SystemExit):
        train(both, tmp_path / "refused")
    assert "merge it with --adapter" in capsys.readouterr().err

    found = train(both, tmp_path / "found", "--adapter", "--export-dtype", "float32")
    expected = train(merged, tmp_path / "expected", "--export-dtype", "float32")
    plain = train(DEMO_MODEL, tmp_path / "plain", "--export-dtype", "float32")
    tensors, others, without = (load_file(f / "model.safetensors") for f in (found, expected, plain))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], atol=1e-5, rtol=1e-4)
    name = "model.layers.0.mlp.up_proj.U.weight"
    assert not torch.allclose(tensors[name], without[name], atol=1e-3)
    assert not list(found.glob("adapter_*"))  # or it would be refused the next time
    AutoModelForCausalLM.from_pretrained(found)


def test_merge_makes_one_dense_model_of_factors_and_adapter(command, tmp_path, ids):
    compact = tmp_path / "compact"
    model = load_model(Source(str(DEMO_MODEL)), torch.float32)
    lowrank_ft.convert(model, rank=8)
    save_compact(model, compact, base_model=str(DEMO_MODEL), companions_from=DEMO_MODEL)
    adapted = add_lora(compact, ["q_proj.U", "q_proj.V", "down_proj.U"])

    refused = command("merge", compact, "--output-dir", tmp_path / "refused")
    assert refused.returncode == 1
    assert "merge it with --adapter" in refused.stderr
    done = command("merge", compact, "--adapter", "--output-dir", tmp_path / "dense")
    assert done.returncode == 0, done.stderr
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not list((tmp_path / "dense").glob("adapter_*"))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, adapted(ids).logits, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(
            dense(ids).logits, load_model(Source(str(DEMO_MODEL)), torch.float32)(ids).logits, atol=0.1
        )
