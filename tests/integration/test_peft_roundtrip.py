"""The PEFT method from one process to the next: adapters and compact checkpoints load bit for bit."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lowrank_ft.integrations.peft.layer as layer_module
from lowrank_ft.integrations.peft import LowRankConfig
from lowrank_ft.nn import LowRankLinear, end_guidance, set_alpha
from lowrank_ft.schedule import alpha_at

IDS = torch.tensor([[3, 9, 27, 17, 51, 25, 11, 33]])


def make_llama():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def make_gpt2():
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


@pytest.fixture(params=[make_llama, make_gpt2], ids=["llama", "gpt2"])
def dense_dir(request, tmp_path):
    torch.manual_seed(0)
    request.param().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load_dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model, steps: int, guided_steps: int = 0) -> list[float]:
    """A few steps on one sequence, the guide phased out as a trainer does."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        set_alpha(model, alpha_at(step, guided_steps))
        if step == guided_steps:
            end_guidance(model, optimizer)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_fresh(script: str, *arguments) -> None:
    """Run a script in a process that has nothing of this one."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


LOAD_ADAPTER = """
    import sys
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    import lowrank_ft.integrations.peft

    dense, adapter, expected = sys.argv[1:]
    for low_memory in (False, True):
        model = AutoModelForCausalLM.from_pretrained(dense)
        model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=low_memory).eval()
        found = model(input_ids=torch.tensor([[3, 9, 27, 17, 51, 25, 11, 33]])).logits
        assert torch.equal(found, torch.load(expected)), (found - torch.load(expected)).abs().max()
        assert not [n for n, p in model.named_parameters() if p.is_meta or p.requires_grad]
"""


@pytest.mark.parametrize(("guide", "alpha"), [("residual", 0.3), ("none", 0.0)])
def test_adapter_round_trip_in_a_fresh_process(dense_dir, tmp_path, guide, alpha):
    model = get_peft_model(load_dense(dense_dir), LowRankConfig(r=6, guide=guide, rank_pattern={"c_proj|o_proj": 0.25}))
    train(model, 2, guided_steps=10)
    set_alpha(model, alpha)
    torch.save(logits(model.eval()), tmp_path / "expected.pt")
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    suffixes = {name.rpartition(".")[2] for name in tensors}
    initial = {"lowrank_U0", "lowrank_V0"} if guide == "residual" else set()
    assert suffixes == {"lowrank_U", "lowrank_V"} | initial
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["guide"], config["alpha"]) == ("LOWRANK", guide, alpha)
    run_fresh(LOAD_ADAPTER, dense_dir, tmp_path / "adapter", tmp_path / "expected.pt")


@pytest.mark.parametrize("low_memory", [False, True])
def test_loading_does_not_decompose_anything(dense_dir, tmp_path, monkeypatch, low_memory):
    model = get_peft_model(load_dense(dense_dir), LowRankConfig(r=6))
    train(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(layer_module, "truncated_svd", None)
    again = PeftModel.from_pretrained(load_dense(dense_dir), tmp_path / "adapter", low_cpu_mem_usage=low_memory).eval()
    again.load_adapter(tmp_path / "adapter", "second", low_cpu_mem_usage=low_memory)
    expected = logits(model.eval())
    assert torch.equal(logits(again), expected)
    again.set_adapter("second")
    assert torch.equal(logits(again), expected)


def test_a_checkpoint_knows_that_guidance_is_over(dense_dir, tmp_path):
    model = get_peft_model(load_dense(dense_dir), LowRankConfig(r=6))
    losses = train(model, 8, guided_steps=4)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["guide"], config["alpha"]) == ("none", 0.0)
    assert not [
        k for k in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "0" in k.split("lowrank_")[1]
    ]
    again = PeftModel.from_pretrained(load_dense(dense_dir), tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_resume_training_where_the_checkpoint_left_off(dense_dir, tmp_path):
    model = get_peft_model(load_dense(dense_dir), LowRankConfig(r=6))
    train(model, 2, guided_steps=4)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_dense(dense_dir), tmp_path / "adapter", is_trainable=True)
    assert train(again.eval(), 4, guided_steps=2) == train(model.eval(), 4, guided_steps=2)


def test_transformers_own_adapter_methods(dense_dir, tmp_path):
    model = get_peft_model(load_dense(dense_dir), LowRankConfig(r=6))
    train(model, 2)
    model.save_pretrained(tmp_path / "adapter")
    plain = load_dense(dense_dir)
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain.eval()), logits(model.eval()))


def test_automodel_loads_an_adapter_folder(dense_dir, tmp_path):
    """transformers follows ``base_model_name_or_path`` of the adapter's config."""
    model = get_peft_model(load_dense(dense_dir), LowRankConfig(r=6))
    train(model, 2)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model.eval()), tmp_path / "expected.pt")
    script = """
        import sys
        import torch
        from transformers import AutoModelForCausalLM
        import lowrank_ft.integrations.peft

        model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
        assert any("lowrank_U" in n for n, _ in model.named_parameters())
        found = model(input_ids=torch.tensor([[3, 9, 27, 17, 51, 25, 11, 33]])).logits
        assert torch.equal(found, torch.load(sys.argv[2]))
    """
    run_fresh(script, tmp_path / "adapter", tmp_path / "expected.pt")


LOAD_COMPACT = """
    import sys
    import torch
    from transformers import AutoModelForCausalLM
    import lowrank_ft

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    assert any(isinstance(m, lowrank_ft.LowRankLinear) for m in model.modules())
    found = model(input_ids=torch.tensor([[3, 9, 27, 17, 51, 25, 11, 33]])).logits
    assert torch.equal(found, torch.load(sys.argv[2]))
"""


def test_compact_checkpoint_in_a_fresh_process(dense_dir, tmp_path):
    model = get_peft_model(load_dense(dense_dir), LowRankConfig(r=6))
    train(model, 4, guided_steps=2)
    expected = logits(model.eval())
    bare = model.compact_and_unload()
    assert any(isinstance(m, LowRankLinear) for m in bare.modules())
    torch.testing.assert_close(logits(bare), expected)
    bare.save_pretrained(tmp_path / "compact", save_original_format=False)
    assert json.loads((tmp_path / "compact" / "config.json").read_text())["quantization_config"]["base_model"] == str(
        dense_dir
    )
    torch.save(logits(bare), tmp_path / "expected.pt")
    run_fresh(LOAD_COMPACT, tmp_path / "compact", tmp_path / "expected.pt")
