"""A mixture of experts from a checkpoint to a compact one, through the command line, training and fresh processes."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lowrank_ft
from lowrank_ft.nn import FactoredExperts, stored_form
from tests.conftest import DEMO_MODEL

EXPERTS = "model.layers.0.mlp.experts"
TEXT = "Enter HAMLET. To be, or not to be, that is the question. Exit GHOST, and a cock crows.\n"
FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code={trust})
torch.save(model(torch.arange(3, 30)[None]).logits, {out!r})
assert "lowrank_ft" not in sys.modules
print(type(model.model.layers[0].mlp.experts).__name__)
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """With the demo's tokenizer; 4 experts of width 24, 2 for each token."""
    folder = tmp_path_factory.mktemp("moe") / "dense"
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        max_position_embeddings=64, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT * 200)
    return folder


@pytest.fixture(scope="module")
def text(dense):
    return dense.parent / "text.txt"


@torch.no_grad()
def logits(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)(torch.arange(3, 30)[None]).logits


def convert(command, dense, text, out, *more):
    flags = ["--param-ratio", "0.6", "--calibration-data", text, "--calibration-tokens", "2048"]
    return command("convert", dense, *flags, "--output-dir", out, *more)


def test_plan_shows_stacks(command, dense, tmp_path):
    done = command("plan", dense, "--param-ratio", "0.6", "--tokens", "1M")
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if "mlp.experts.down_proj" in line]
    assert "4 of 32 x 24" in row
    assert "experts" not in "".join(line for line in done.stdout.splitlines() if line.startswith("note"))
    plan = command("plan", dense, "--param-ratio", "0.6", "--json")
    (tmp_path / "plan.json").write_text(plan.stdout)
    done = command(
        "convert", dense, "--plan", tmp_path / "plan.json", "--method", "svd", "--output-dir", tmp_path / "c"
    )
    assert done.returncode == 0, done.stderr
    ranks = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]["ranks"]
    assert ranks == {e["name"]: e["rank"] for e in json.loads(plan.stdout)["linears"] if e["rank"] is not None}


@pytest.mark.parametrize("effort", ["fast", "default", "best"])
def test_converted_loaded_without_the_package_and_merged(command, python, dense, text, tmp_path, effort):
    compact, merged, out = tmp_path / "compact", tmp_path / "merged", tmp_path / "out.pt"
    done = convert(command, dense, text, compact, "--effort", effort, "--own-share", "0")
    assert done.returncode == 0, done.stderr
    entry = json.loads((compact / "config.json").read_text())["quantization_config"]
    assert entry["format_version"] == 3
    assert set(entry["pivots"]) == set(entry["ranks"])
    assert {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"} <= set(entry["ranks"])
    expected = logits(compact)
    found = python("-c", FRESH.format(folder=str(compact), trust=True, out=str(out)))
    assert found.stdout.split()[-1] == "FactoredExperts"
    torch.testing.assert_close(torch.load(out), expected, rtol=1e-5, atol=1e-5)
    assert command("merge", compact, "--output-dir", merged).returncode == 0
    found = python("-c", FRESH.format(folder=str(merged), trust=False, out=str(out)))
    assert found.stdout.split()[-1] == "Qwen3MoeExperts"
    torch.testing.assert_close(torch.load(out), expected, rtol=1e-3, atol=1e-3)
    before = logits(dense)
    assert (expected - before).norm() < 0.8 * before.norm()
    done = command("report", compact)
    assert done.returncode == 0, done.stderr
    assert f"{EXPERTS}.down_proj" in (compact / "report.html").read_text()


def test_who_does_not_know_the_format_stops(command, python, dense, text, tmp_path):
    compact = tmp_path / "compact"
    assert convert(command, dense, text, compact, "--method", "svd").returncode == 0
    config = json.loads((compact / "config.json").read_text())
    entry = config.pop("quantization_config")
    config.pop("auto_map")
    (compact / "config.json").write_text(json.dumps(config))
    done = python("-c", FRESH.format(folder=str(compact), trust=False, out="x"), check=False)
    assert done.returncode != 0
    assert "mismatch" in done.stderr or "size" in done.stderr
    with safe_open(compact / "model.safetensors", framework="pt") as file:
        assert file.get_tensor(f"{EXPERTS}.down_proj").shape == (1,)
    assert entry["quant_method"] == "lowrank"


@pytest.fixture
def run(text, short_finetune):
    return partial(short_finetune, text)


@pytest.mark.parametrize(("start", "options"), [
    ("dense", {"guide": "residual"}), ("dense", {"guide": "none"}), ("compact", {"guide": "dense"}),
    ("compact", {"guide": "none", "trainable": "lora", "lora_r": 2}),
])  # fmt: skip
def test_fine_tuned_resumed_and_exported(run, command, dense, text, tmp_path, start, options):
    straight, model = tmp_path / "straight", {"model": dense, "param_ratio": 0.6}
    if start == "compact":
        model = {"model": tmp_path / "compact"}
        assert convert(command, dense, text, model["model"], "--method", "svd").returncode == 0
    run(straight, **model, **options)
    loaded = AutoModelForCausalLM.from_pretrained(straight)
    assert isinstance(loaded.model.layers[0].mlp.experts, FactoredExperts)
    assert all(s.pivot for s in loaded.model.layers[0].mlp.experts.factors.values())
    for step in (1, 3):  # with guides, if there are any, and without
        resumed, name = tmp_path / f"from-{step}", f"step-{step:08d}"
        shutil.copytree(straight / "checkpoints" / name, resumed / "checkpoints" / name)
        run(resumed, resume_from_checkpoint="auto", **model, **options)
        assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    exported = tmp_path / "exported"
    done = command("export", straight / "checkpoints" / "step-00000003", "--output-dir", exported)
    assert done.returncode == 0, done.stderr
    again = AutoModelForCausalLM.from_pretrained(exported)
    assert stored_form(again) == stored_form(loaded)
    assert torch.isfinite(logits(exported)).all()


def test_both_forms_are_exported_and_saved_again(command, dense, text, tmp_path):
    compact, plain, back = (tmp_path / n for n in ("compact", "plain", "back"))
    assert convert(command, dense, text, compact, "--method", "activation", "--effort", "fast").returncode == 0
    assert command("export", compact, "--form", "factors", "--output-dir", plain).returncode == 0
    assert json.loads((plain / "config.json").read_text())["quantization_config"]["format_version"] == 3
    torch.testing.assert_close(logits(plain), logits(compact), rtol=1e-3, atol=1e-3)
    model = AutoModelForCausalLM.from_pretrained(compact)
    assert lowrank_ft.unpivot(model) == len(stored_form(model)[0])
    model.save_pretrained(back)
    torch.testing.assert_close(logits(back), logits(compact), rtol=1e-3, atol=1e-3)


def test_the_report_measures_experts_where_nothing_was_recorded(command, dense, text, tmp_path):
    compact = tmp_path / "compact"
    assert convert(command, dense, text, compact, "--method", "svd").returncode == 0
    recorded = json.loads((compact / "conversion.json").read_text())["linears"][f"{EXPERTS}.down_proj"]
    (compact / "conversion.json").unlink()
    done = command("report", compact, "--baseline", dense)
    assert done.returncode == 0, done.stderr
    page = (compact / "report.html").read_text()
    assert f"{recorded['weight_error']:.3f}"[:4] in page
