"""A second method over the factors: compact checkpoints in 8 and 4 bits, by the usual call, and what stands on them.

bitsandbytes runs here; torchao and optimum-quanto where they are installed (``make quantized-suite``).
"""

import importlib.util
import json
import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AwqConfig,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
)

import lowrank_ft
from lowrank_ft.errors import CheckpointError, TargetError
from lowrank_ft.nn import lowrank_layers
from lowrank_ft.nn.forms import layer_factors
from lowrank_ft.nn.replace import merge
from tests.conftest import ROOT, tiny_gpt2, tiny_llama

BITS = {
    "8bit": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
LIMITS = {"8bit": 0.04, "nf4": 0.3, "fp4": 0.4}  # relative errors of one product; measured: up to 0.015, 0.20, 0.27

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; pip install 'lowrank-ft[quantized]'",
)
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed; make quantized-suite"
)
needs_quanto = pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.quanto") is None,
    reason="optimum-quanto is not installed; make quantized-suite",
)


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    """A compact checkpoint with biases and a linear that stays dense."""
    model = tiny_llama(hidden_size=64, intermediate_size=128, attention_bias=True)
    lowrank_ft.convert(model, rank=24, exclude_modules=["k_proj"])
    folder = tmp_path_factory.mktemp("models") / "compact"
    lowrank_ft.save_compact(model, folder)
    return folder


def load(folder, bits=None, cls=AutoModelForCausalLM, **options):
    config = {} if bits is None else {"quantization_config": BitsAndBytesConfig(**BITS[bits])}
    return cls.from_pretrained(folder, **config, **options).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "form"), [("8bit", "pivoted"), ("nf4", "pivoted"), ("fp4", "factors")])
def test_the_usual_call_quantizes_both_factors_and_what_is_dense(compact, tmp_path, ids, bits, form):
    import bitsandbytes as bnb

    if form == "factors":
        lowrank_ft.save_compact(load(compact), tmp_path / "plain", form=form)
        compact = tmp_path / "plain"
    kind = bnb.nn.Linear8bitLt if bits == "8bit" else bnb.nn.Linear4bit
    plain, model = load(compact), load(compact, bits)
    layers = dict(lowrank_layers(model))
    assert {layer.pivot for layer in layers.values()} == ({None} if form == "factors" else {"input", "output"})
    assert layers.keys() == dict(lowrank_layers(plain)).keys()
    assert all(type(part) is kind for layer in layers.values() for part in (layer.U, layer.V))
    assert type(model.model.layers[0].self_attn.k_proj) is kind
    assert type(model.lm_head) is torch.nn.Linear
    for name, expected in lowrank_layers(plain):
        x = torch.randn(7, expected.in_features)
        with torch.no_grad():
            assert 1e-4 < error(layers[name](x), expected(x)) < LIMITS[bits], name
    assert 1e-4 < error(logits(model, ids), logits(plain, ids)) < 2 * LIMITS[bits]


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_saved_and_loaded_again_bit_for_bit(compact, tmp_path, ids, python, bits):
    model = load(compact, bits)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "both")
    entry = json.loads((tmp_path / "both" / "config.json").read_text())["quantization_config"]
    assert (entry["quant_method"], entry["format_version"]) == ("lowrank", 3)
    assert entry["quantized"]["quant_method"] == "bitsandbytes"
    assert entry["ranks"]
    assert entry["pivots"]
    again = load(tmp_path / "both")
    assert torch.equal(logits(again, ids), expected)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(load(tmp_path / "twice"), ids), expected)
    torch.save(ids, tmp_path / "ids.pt")
    script = (
        "import lowrank_ft, torch; from transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(tmp_path / 'both')!r})\n"
        f"with torch.no_grad(): torch.save(model(torch.load({str(tmp_path / 'ids.pt')!r})).logits, 'out.pt')"
    )
    python("-c", script)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["nf4", "fp4"])
def test_cpus_that_repack_weights_get_the_same_model(compact, tmp_path, ids, monkeypatch, bits):
    """On CPUs that multiply in bfloat16, bitsandbytes repacks 4-bit weights, and stops at ranks that are not of 32."""
    expected = logits(load(compact, bits), ids)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load(compact, bits)
    assert torch.equal(logits(model, ids), expected)
    model.save_pretrained(tmp_path / "both")
    again = load(tmp_path / "both")
    assert torch.equal(logits(again, ids), expected)
    assert error(logits(again.dequantize(), ids), expected) < 1e-2


@needs_bitsandbytes
def test_factors_are_stored_in_their_bits(compact, tmp_path):
    sizes = {}
    for bits in (None, "8bit", "nf4"):
        load(compact, bits).save_pretrained(tmp_path / str(bits))
        tensors = load_file(tmp_path / str(bits) / "model.safetensors")
        sizes[bits] = sum(t.nbytes for n, t in tensors.items() if n.endswith((".U.weight", ".V.weight")))
    assert (sizes["8bit"], sizes["nf4"]) == (sizes[None] / 4, sizes[None] / 8)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "nf4"])
def test_other_classes_find_the_factors_by_their_names(compact, tmp_path, ids, bits):
    causal = load(compact, bits)
    causal.save_pretrained(tmp_path / "both")
    with torch.no_grad():
        expected = causal.model(input_ids=ids).last_hidden_state
    for folder, config in ((compact, bits), (tmp_path / "both", None)):
        for cls in (AutoModel, AutoModelForSequenceClassification):
            model = load(folder, config, cls)
            base = getattr(model, "model", model)
            with torch.no_grad():
                assert torch.equal(base(input_ids=ids).last_hidden_state, expected), (folder, cls)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "nf4"])
def test_models_whose_dense_linears_are_transposed(tmp_path, ids, bits):
    model = tiny_gpt2()
    lowrank_ft.convert(model, rank=8, exclude_modules=["c_attn"])
    lowrank_ft.save_compact(model, tmp_path / "compact")
    plain, quantized = load(tmp_path / "compact"), load(tmp_path / "compact", bits)
    assert error(logits(quantized, ids), logits(plain, ids)) < 2 * LIMITS[bits]
    quantized.save_pretrained(tmp_path / "both")
    assert torch.equal(logits(load(tmp_path / "both"), ids), logits(quantized, ids))


@needs_bitsandbytes
def test_a_linear_that_is_named_to_stay_keeps_its_factors(compact):
    config = BitsAndBytesConfig(**BITS["8bit"], llm_int8_skip_modules=["down_proj", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was asked for needs no warning
        model = AutoModelForCausalLM.from_pretrained(compact, quantization_config=config)
    kinds = {n.rpartition(".")[2]: type(layer.U) for n, layer in lowrank_layers(model)}
    assert kinds["down_proj"] is torch.nn.Linear
    assert kinds["up_proj"] is not torch.nn.Linear


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "nf4"])
def test_dequantized_it_is_an_ordinary_compact_model(compact, tmp_path, ids, bits):
    model = load(compact, bits)
    before = logits(model, ids)
    model = model.dequantize()
    assert error(logits(model, ids), before) < (
        0.03 if bits == "8bit" else 1e-2
    )  # 8-bit layers round their inputs, too
    model.half().float()
    expected = logits(model, ids)
    lowrank_ft.save_compact(model, tmp_path / "compact")
    entry = json.loads((tmp_path / "compact" / "config.json").read_text())["quantization_config"]
    assert "quantized" not in entry
    assert entry["format_version"] == 2
    torch.testing.assert_close(logits(load(tmp_path / "compact"), ids), expected)


@needs_bitsandbytes
def test_without_the_package_the_plugin_does_the_same(compact, tmp_path, ids, python):
    torch.save(ids, tmp_path / "ids.pt")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A, BitsAndBytesConfig as B\n"
        f"model = A.from_pretrained({str(compact)!r}, trust_remote_code=True, quantization_config=B(load_in_8bit=True))\n"
        "assert 'lowrank_ft' not in sys.modules\n"
        f"with torch.no_grad(): torch.save(model(torch.load({str(tmp_path / 'ids.pt')!r})).logits, 'out.pt')"
    )
    python("-c", script)
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(load(compact, "8bit"), ids))


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["8bit", "nf4"])
def test_lora_on_quantized_factors_learns_and_comes_back(compact, tmp_path, ids, bits):
    model = prepare_model_for_kbit_training(load(compact, bits), use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["U", "V"]))
    adapted = [n for n, m in model.named_modules() if n.endswith((".U", ".V")) and hasattr(m, "lora_A")]
    assert len(adapted) == 2 * len(list(lowrank_layers(model)))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert all("lora" in n for n, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        prepare_model_for_kbit_training(load(compact, bits), use_gradient_checkpointing=False), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(again.eval(), ids), logits(model.eval(), ids))


@needs_bitsandbytes
def test_what_needs_the_numbers_of_the_factors_says_so(compact, tmp_path):
    model, dense = load(compact, "nf4"), tiny_llama(hidden_size=64, intermediate_size=128, attention_bias=True)
    for action in (
        lambda: lowrank_ft.unpivot(model),
        lambda: lowrank_ft.attach_guides(model, dense, "residual"),
        lambda: lowrank_ft.save_compact(model, tmp_path / "out"),
        lambda: merge(model),
    ):
        with pytest.raises(
            TargetError, match=r"quantized \(Linear4bit with Params4bit\); load .* model.dequantize\(\)"
        ):
            action()
    assert not (tmp_path / "out").exists()


@needs_bitsandbytes
def test_a_config_of_a_quantized_checkpoint_gives_no_empty_model(compact, tmp_path):
    load(compact, "8bit").save_pretrained(tmp_path / "both")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "both"))
    with pytest.raises(CheckpointError, match="is quantized, and its layers cannot be made without its weights"):
        lowrank_ft.apply_config(model)


@needs_bitsandbytes
def test_four_bits_on_pivoted_factors_harm_more_and_say_so(compact, tmp_path):
    lowrank_ft.save_compact(load(compact), tmp_path / "plain", form="factors")
    found = {}
    for folder in (compact, tmp_path / "plain"):
        plain = {name: layer_factors(layer) for name, layer in lowrank_layers(load(folder))}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = load(folder, "nf4").dequantize()
        assert any("write plain factors first" in str(w.message) for w in said) == (folder == compact)
        shares = [
            error(torch.mm(*layer_factors(layer)), torch.mm(*plain[name])) for name, layer in lowrank_layers(model)
        ]
        found[folder] = sum(shares) / len(shares)
    assert found[compact] > 1.1 * found[tmp_path / "plain"]


def test_methods_that_cannot_go_over_factors_are_refused(compact):
    with pytest.raises(
        ValueError, match=r"AwqConfig \(awq\) cannot quantize the factors .*; bitsandbytes, torchao, quanto"
    ):
        AutoModelForCausalLM.from_pretrained(compact, quantization_config=AwqConfig())


@needs_bitsandbytes
def test_a_second_method_is_not_added_to_a_checkpoint_that_has_one(compact, tmp_path, ids):
    model = load(compact, "8bit")
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(
        ValueError, match="is quantized with BitsAndBytesConfig already, and QuantoConfig cannot be added"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "both", quantization_config=QuantoConfig(weights="int8"))
    with pytest.warns(UserWarning, match="is quantized already, as its config.json says; that is kept"):
        again = load(tmp_path / "both", "nf4")
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_other_checkpoints_are_merged_as_before(tmp_path):
    from transformers.quantizers.auto import AutoHfQuantizer

    with pytest.raises(ValueError, match="is quantized with BitsAndBytesConfig but you are passing a QuantoConfig"):
        AutoHfQuantizer.merge_quantization_configs(
            BitsAndBytesConfig(load_in_8bit=True).to_dict(), QuantoConfig(weights="int8")
        )


@needs_torchao
@pytest.mark.parametrize("kind", ["int8", "4 bits by row", "4 bits in groups"])
def test_torchao_quantizes_saves_and_loads_again(compact, tmp_path, ids, kind):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup

    granularity = PerAxis(0) if kind == "4 bits by row" else PerGroup(8)
    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
    config = TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else four)
    model = AutoModelForCausalLM.from_pretrained(compact, quantization_config=config)
    assert all("torchao" in type(layer.U.weight).__module__ for _, layer in lowrank_layers(model))
    expected = logits(model, ids)
    assert 1e-4 < error(expected, logits(load(compact), ids)) < (0.03 if kind == "int8" else 0.4)
    model.save_pretrained(tmp_path / "both")
    assert torch.equal(logits(load(tmp_path / "both"), ids), expected)


@needs_torchao
def test_groups_that_do_not_divide_the_factors_are_refused(compact):
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    config = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    with pytest.raises(ValueError, match=r"groups of 32, which do not divide .* can be cut into groups of 8, or take"):
        AutoModelForCausalLM.from_pretrained(compact, quantization_config=config)


@needs_quanto
@pytest.mark.parametrize(("weights", "limit"), [("int8", 0.03), ("int4", 0.4)])
def test_quanto_quantizes_and_transformers_cannot_save_it(compact, tmp_path, ids, weights, limit):
    model = AutoModelForCausalLM.from_pretrained(compact, quantization_config=QuantoConfig(weights=weights))
    assert {type(layer.U).__name__ for _, layer in lowrank_layers(model)} == {"QLinear"}
    found = error(logits(model, ids), logits(load(compact), ids))
    assert 1e-4 < found < limit
    with pytest.raises(ValueError, match="is not serializable"):
        model.save_pretrained(tmp_path / "both")


@needs_bitsandbytes
def test_the_code_of_the_documentation_runs(compact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compact").symlink_to(compact, target_is_directory=True)
    lowrank_ft.save_compact(load(compact), tmp_path / "compact-factors", form="factors")  # the command of the page
    page = (ROOT / "docs" / "how-to" / "quantize.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "quantize.md", "exec"), names)
    assert (tmp_path / "compact-again" / "model.safetensors").is_file()
