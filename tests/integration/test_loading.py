"""A compact checkpoint in processes that know the package, that trust its code, and that know nothing."""

import ast
import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.quantizers.base import HfQuantizer

import lowrank_ft
from lowrank_ft.checkpoints.loader import LowRankQuantizationConfig, LowRankQuantizer
from lowrank_ft.checkpoints.plugin import plugin_source
from lowrank_ft.export import save_compact
from lowrank_ft.nn import LowRankLinear, lowrank_layers
from lowrank_ft.nn.forms import stored_as
from tests.conftest import tiny_gpt2, tiny_llama

LOGITS = """
import sys, torch
{before}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}{extra})
ids = torch.load({ids!r})
with torch.no_grad():
    torch.save(model(ids).logits, {out!r})
    model.generate(ids[:1], max_new_tokens=3, do_sample=False)
assert ("lowrank_ft" in sys.modules) is {knows}
model.half(); model.float().train(); model.requires_grad_(True)
"""


@pytest.fixture
def checkpoint(tmp_path, ids):
    """The folder, the in-memory model, and its logits in the form in which it is stored."""
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    with torch.no_grad(), stored_as(model, "pivoted"):
        logits = model(ids).logits
    torch.save(ids, tmp_path / "ids.pt")
    save_compact(model, tmp_path / "compact", base_model="me/dense")
    return tmp_path / "compact", model, logits


def script(tmp_path, folder, before="", extra="", knows=True):
    return LOGITS.format(
        before=before, folder=str(folder), extra=extra, ids=str(tmp_path / "ids.pt"), out=str(tmp_path / "out.pt"),
        knows=knows,
    )  # fmt: skip


def test_with_the_package_bit_for_bit(checkpoint, python, tmp_path):
    folder, _, logits = checkpoint
    python("-c", script(tmp_path, folder, before="import lowrank_ft"))
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits)


def test_without_the_package_bit_for_bit_where_the_code_is_trusted(checkpoint, python, tmp_path):
    folder, _, logits = checkpoint
    block = "sys.modules['lowrank_ft'] = None  # importing it would fail\ndel sys.modules['lowrank_ft']"
    code = script(tmp_path, folder, before=block, extra=", trust_remote_code=True", knows=False)
    python("-c", code, HF_HOME=str(tmp_path / "hf"))
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits)


def test_without_the_package_it_raises_and_gives_no_random_weights(checkpoint, python, tmp_path):
    folder, _, _ = checkpoint
    done = python("-c", script(tmp_path, folder, knows=False), check=False)
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr
    assert "mismatch" in done.stderr.lower()
    assert not (tmp_path / "out.pt").exists()


def test_the_plugin_stands_alone():
    tree = ast.parse(plugin_source())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= {
        "torch",
        "transformers",
        "safetensors",
        "collections",
        "math",
        "types",
        "typing",
        "warnings",
        "weakref",
    }


def test_the_folder_holds_safetensors_and_no_pickle(checkpoint):
    folder, model, _ = checkpoint
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "lowrank_plugin.py", "model.safetensors",
        "rank_map.png",
    ]  # fmt: skip
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        tripwire = file.get_slice("model.layers.0.mlp.up_proj.weight").get_shape()
    assert tripwire == [1]
    assert {"model.layers.0.mlp.up_proj.U.weight", "model.layers.0.mlp.up_proj.V.weight"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    entry = config["quantization_config"]
    assert (entry["quant_method"], entry["format_version"], entry["base_model"]) == ("lowrank", 2, "me/dense")
    assert entry["ranks"] == {n: layer.rank for n, layer in lowrank_layers(model)}


def test_what_is_loaded_is_an_ordinary_model(checkpoint, ids):
    folder, _, _logits = checkpoint
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model, "hf_quantizer")
    assert not getattr(model, "is_quantized", False)
    assert not getattr(model.config, "auto_map", None)
    model(ids, labels=ids).loss.backward()
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, LowRankLinear)
    assert layer.U.weight.grad.any()
    assert layer.V.weight.grad.any()


def test_save_pretrained_round_trip(checkpoint, tmp_path, ids):
    folder, _, logits = checkpoint
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, logits)


def test_plain_save_pretrained_after_convert_loads(tmp_path, ids):
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    model.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits, model(ids).logits)


def test_shards_dtypes_and_the_bare_model(checkpoint, tmp_path, ids):
    folder, model, logits = checkpoint
    save_compact(model, tmp_path / "sharded", max_shard_size="20kB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")(ids).logits, logits)
        half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert half.model.layers[0].mlp.up_proj.U.weight.dtype == torch.bfloat16
        torch.testing.assert_close(half(ids).logits.float(), logits, atol=0.02, rtol=0.1)
        body = AutoModel.from_pretrained(folder)
        expected = AutoModelForCausalLM.from_pretrained(folder).model(ids).last_hidden_state
        assert torch.equal(body(ids).last_hidden_state, expected)


def test_a_bare_checkpoint_loads_under_a_head(tmp_path, ids):
    body = tiny_llama().model
    lowrank_ft.convert(body, rank=8)
    save_compact(body, tmp_path / "body")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    with torch.no_grad(), stored_as(body, "pivoted"):
        assert torch.equal(model.model(ids).last_hidden_state, body(ids).last_hidden_state)


def test_device_map_with_offload(checkpoint, tmp_path, ids):
    folder, _, logits = checkpoint
    device_map = dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    device_map["model.layers.1"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=str(tmp_path / "off"))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits)


def test_a_newer_format_is_refused(checkpoint):
    folder, _, _ = checkpoint
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format version 4, and this code reads up to 3; run pip install --upgrade"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_config_that_misses_a_linear_meets_the_tripwire(checkpoint):
    folder, _, _ = checkpoint
    text = (folder / "config.json").read_text().replace("layers.1.mlp.up_proj", "layers.7.mlp.up_proj")
    (folder / "config.json").write_text(text)
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint):
    folder, _, _ = checkpoint
    text = (folder / "config.json").read_text().replace("model.layers", "model.blocks")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="has none of the factored linears of the checkpoint"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_part_of_a_model_loads(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    lowrank_ft.convert(model, rank=6)
    save_compact(model, tmp_path / "t5")
    encoder = T5EncoderModel.from_pretrained(tmp_path / "t5")
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad(), stored_as(model, "pivoted"):
        assert torch.equal(encoder(tokens)[0], model.encoder(tokens)[0])


def test_autocast_keeps_its_dtype_where_there_is_a_bias():
    model = tiny_gpt2()
    lowrank_ft.convert(model, rank=6, guide="residual")
    layer = model.transformer.h[0].mlp.c_fc
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(torch.randn(2, 32)).dtype == torch.bfloat16
        lowrank_ft.end_guidance(model)


def test_a_dense_model_is_not_factorized_on_load(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="convert it first"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=LowRankQuantizationConfig({}))


def test_registration_can_be_repeated_and_the_package_wins(checkpoint, python, tmp_path):
    folder, _, logits = checkpoint
    before = f"""
from transformers import AutoConfig, AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
import lowrank_ft, importlib
importlib.reload(lowrank_ft)
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert isinstance(model.model.layers[0].mlp.up_proj, lowrank_ft.LowRankLinear)
"""
    python("-c", script(tmp_path, folder, before=before), HF_HOME=str(tmp_path / "hf"))
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits)


def test_the_stock_config_comes_back(checkpoint):
    folder, _, _ = checkpoint
    assert type(AutoConfig.from_pretrained(folder)).__name__ == "LlamaConfig"


def test_transformers_5_19_does_not_tell_the_model(monkeypatch):
    """There the loader is asked for name conversions with one argument less."""
    monkeypatch.setattr(HfQuantizer, "update_weight_conversions", lambda self, conversions: [*conversions, "seen"])
    model = tiny_llama()
    quantizer = LowRankQuantizer(LowRankQuantizationConfig(ranks={"model.layers.0.mlp.up_proj": 4}))
    quantizer._process_model_before_weight_loading(model)
    assert quantizer.update_weight_conversions([]) == ["seen"]
    # transformers copies what holds the quantizer, and the model must not be copied with it
    assert copy.deepcopy(quantizer)._model() is model
