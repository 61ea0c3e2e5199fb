"""Adapters beside bitsandbytes' linears in 8 and 4 bits: what they compute, and the whole way to a compact checkpoint."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lowrank_ft
from lowrank_ft.errors import TargetError
from lowrank_ft.factorization.solvers import truncated_svd
from lowrank_ft.integrations.peft import LowRankConfig
from lowrank_ft.integrations.peft.quantized import dense_weight, is_quantized
from lowrank_ft.nn import compact_view, end_guidance, lowrank_layers, set_alpha
from tests.conftest import tiny_llama

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; pip install 'lowrank-ft[quantized]'")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True}
BITS = pytest.mark.parametrize("bits", [NF4, INT8], ids=["4bit", "8bit"])


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama(hidden_size=64, intermediate_size=128, attention_bias=True).save_pretrained(folder)
    return folder


def load(folder, bits):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**bits)).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def first_layer(model):
    return model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")


@BITS
@pytest.mark.parametrize(("guide", "alpha"), [("none", 0.0), ("residual", 0.3)])
def test_output_and_gradients_match_the_dequantized_weight(dense_dir, bits, guide, alpha):
    model = get_peft_model(load(dense_dir, bits), LowRankConfig(r=8, guide=guide, alpha=alpha))
    layer = first_layer(model)
    assert is_quantized(layer.get_base_layer())
    w = dense_weight(layer.get_base_layer()).double()
    u0, v0 = (t.double() for t in truncated_svd(w.float(), 8, "w"))
    u, v = (p["default"].detach().double().requires_grad_() for p in (layer.lowrank_U, layer.lowrank_V))
    torch.testing.assert_close(u @ v, u0 @ v0, atol=1e-5, rtol=1e-4)  # it starts from the SVD of what the layer holds
    x, grad = torch.randn(5, 64), torch.randn(5, 64)
    ours = x.clone().requires_grad_()
    y = layer(ours)
    y.backward(grad)
    plain = x.double().requires_grad_()
    dense = plain @ w.T
    expected = plain @ (u @ v).T
    if guide == "residual":
        expected = expected + alpha * (dense - plain @ (u0 @ v0).T)
    expected = expected + layer.get_base_layer().bias.double()
    expected.backward(grad.double())
    # 8-bit layers round their inputs, too, to a share of 1/127 of the largest.
    limit = {"atol": 1e-5, "rtol": 1e-4} if "load_in_4bit" in bits else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(y.double(), expected, **limit)
    torch.testing.assert_close(ours.grad.double(), plain.grad, **limit)
    torch.testing.assert_close(layer.lowrank_U["default"].grad.double(), u.grad, **limit)
    torch.testing.assert_close(layer.lowrank_V["default"].grad.double(), v.grad, **limit)


@BITS
def test_training_through_the_guided_phase_to_a_compact_checkpoint(dense_dir, tmp_path, python, ids, bits):
    model = get_peft_model(load(dense_dir, bits), LowRankConfig(r=16, exclude_modules=["down_proj"]))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for step in range(6):
        set_alpha(model, max(0.0, 1 - step / 3))
        if step == 3:
            end_guidance(model, optimizer)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[3] - 0.2
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    with compact_view(model):
        before = logits(model.eval(), ids)
    with pytest.warns(UserWarning, match=r"2 quantized linears .*down_proj, are torch.float32 now"):
        compact = model.compact_and_unload()
    assert not [m for m in compact.modules() if is_quantized(m)]
    assert len(list(lowrank_layers(compact))) == 12
    # The linears that stay were rounding: their inputs in 8 bits, on some CPUs to bfloat16 in 4 bits.
    limit = 5e-2
    torch.testing.assert_close(logits(compact, ids), before, atol=limit, rtol=limit)
    compact.to(torch.float32)  # transformers refuses this while it takes the model for a quantized one
    lowrank_ft.save_compact(compact, tmp_path / "compact")
    script = (
        "import lowrank_ft; from transformers import AutoModelForCausalLM as A; import sys; "
        "m = A.from_pretrained(sys.argv[1]); print(sum(p.numel() for p in m.parameters()))"
    )
    done = python("-c", script, str(tmp_path / "compact"))
    assert int(done.stdout) == sum(p.numel() for p in compact.parameters())


@BITS
def test_merge_requantizes_and_unmerge_puts_the_bits_back(dense_dir, ids, bits):
    model = get_peft_model(load(dense_dir, bits), LowRankConfig(r=32))
    before = logits(model, ids)
    base = first_layer(model).get_base_layer()
    packed, dense = base.weight.detach().clone(), dense_weight(base)
    model.merge_adapter()
    merged = first_layer(model).get_base_layer()
    assert is_quantized(merged)
    target = first_layer(model).lowrank_U["default"] @ first_layer(model).lowrank_V["default"]
    # Rounded to the layer's bits, and still nearer to U V than W is.
    assert (dense_weight(merged) - target).norm() < 0.5 * (dense - target).norm()
    model.unmerge_adapter()
    assert first_layer(model).get_base_layer() is base
    assert torch.equal(base.weight, packed)
    assert torch.equal(logits(model, ids), before)
    stock = copy.deepcopy(model).merge_and_unload()
    assert is_quantized(stock.model.layers[0].self_attn.q_proj)


@BITS
def test_adapters_come_back_beside_a_quantized_base(dense_dir, tmp_path, ids, bits):
    model = get_peft_model(load(dense_dir, bits), LowRankConfig(r=8, guide="residual", alpha=0.5))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    again = PeftModel.from_pretrained(load(dense_dir, bits), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again, ids), expected)


@pytest.mark.parametrize("double_quantized", [False, True])
def test_the_weight_is_the_same_after_inference(dense_dir, ids, double_quantized):
    """Inference on some CPUs repacks 4-bit weights with coarser scales."""
    model = load(dense_dir, {**NF4, "bnb_4bit_use_double_quant": double_quantized})
    fresh = [dense_weight(m) for m in load(dense_dir, {**NF4, "bnb_4bit_use_double_quant": double_quantized}).modules()
             if is_quantized(m)]  # fmt: skip
    logits(model, ids)
    for module, expected in zip(filter(is_quantized, model.modules()), fresh, strict=True):
        torch.testing.assert_close(dense_weight(module), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    exact = get_peft_model(load(dense_dir, NF4), LowRankConfig(r=8))
    before = dense_weight(first_layer(exact).get_base_layer())
    logits(exact, ids)
    assert torch.equal(dense_weight(first_layer(exact).get_base_layer()), before)


def test_conversion_in_place_says_what_to_do(dense_dir):
    with pytest.raises(TargetError, match=r"q_proj is a Linear4bit, quantized to torch.uint8; .* LowRankConfig"):
        lowrank_ft.convert(load(dense_dir, NF4), rank=8)
