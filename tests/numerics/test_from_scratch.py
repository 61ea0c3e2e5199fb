"""Low-rank initialization against a full SVD in float64, and what training starts from."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lowrank_ft
from lowrank_ft.errors import ConfigError, PlanError, RankError, TargetError
from lowrank_ft.factorization.targets import ffn_linears
from lowrank_ft.nn import GuidedLowRankLinear, LowRankLinear, guided_layers, lowrank_layers
from lowrank_ft.nn.replace import dense_weight
from lowrank_ft.pretraining.initialize import initialize_lowrank
from tests.conftest import DEMO_MODEL, tiny_gpt2, tiny_llama

LLAMA_FFN = {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}
GPT2_FFN = {"transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"}


def tiny_wide(**overrides):
    """A small cousin of the wide presets: attention 32 wide with grouped heads in a model that is 48 wide."""
    sizes = dict(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=80, vocab_size=97, sequence_length=64, rank=8, sequences_per_step=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(lowrank_ft.preset_config("wei2024-m-wide", **{**sizes, **overrides}))


@pytest.mark.parametrize(("make", "names"), [(tiny_llama, LLAMA_FFN), (tiny_gpt2, GPT2_FFN)])
def test_factors_are_the_truncated_svd_of_the_models_own_weight(make, names):
    model = make()
    before = copy.deepcopy(model)
    untouched = {n: p for n, p in model.named_parameters() if n.removesuffix(".weight") not in names}
    plan = initialize_lowrank(model, rank=8)
    assert set(plan.ranks) == {n for n, _ in lowrank_layers(model)} == names
    for name, layer in lowrank_layers(model):
        weight = dense_weight(before.get_submodule(name)).double()
        left, s, right = torch.linalg.svd(weight, full_matrices=False)
        u, v = layer.U.weight.detach().double(), layer.V.weight.detach().double()
        torch.testing.assert_close(u @ v, (left[:, :8] * s[:8]) @ right[:8], rtol=0, atol=1e-7)
        # sqrt(s) in each factor, and nothing but that
        torch.testing.assert_close(u.T @ u, torch.diag(s[:8]), rtol=0, atol=1e-6)
        torch.testing.assert_close(v @ v.T, torch.diag(s[:8]), rtol=0, atol=1e-6)
        assert type(layer) is LowRankLinear
    after = dict(model.named_parameters())
    assert all(after[n] is p for n, p in untouched.items())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_wide])
def test_a_guide_starts_at_the_product_so_alpha_changes_nothing(make, ids):
    model = make().eval().double()
    initialize_lowrank(model, rank=8, guide="dense")
    layers = dict(guided_layers(model))
    assert layers
    for layer in layers.values():
        assert layer.kind == "dense"
        assert layer.guide.weight.requires_grad
        product = layer.U.weight.detach() @ layer.V.weight.detach()
        torch.testing.assert_close(layer.guide.weight.detach(), product, rtol=1e-14, atol=1e-16)
    outputs = []
    for alpha in (1.0, 0.5, 0.0):
        lowrank_ft.set_alpha(model, alpha)
        outputs.append(model(input_ids=ids).logits)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(outputs[1], outputs[2], rtol=1e-11, atol=1e-12)
    lowrank_ft.set_alpha(model, 0.5)
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in layers.values():
        # d/dU = (d/dy)(V x) (1 - a) and so on: both branches see the same upstream gradient, weighted 1/2 here
        guide = layer.guide.weight.grad
        torch.testing.assert_close(layer.U.weight.grad, guide @ layer.V.weight.T, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(layer.V.weight.grad, layer.U.weight.T @ guide, rtol=1e-10, atol=1e-14)


def test_in_bfloat16_the_guide_is_the_product_rounded_once():
    model = tiny_llama().bfloat16()
    initialize_lowrank(model, rank=8, guide="dense")
    for _, layer in guided_layers(model):
        product = layer.U.weight.detach().double() @ layer.V.weight.detach().double()
        assert torch.equal(layer.guide.weight.detach(), product.bfloat16())


def test_the_first_block_and_attention_are_options():
    model = tiny_llama()
    plan = initialize_lowrank(model, param_ratio=0.5, dense_first_block=False)
    assert len(plan.ranks) == 6
    assert plan.param_ratio <= 0.5
    model = tiny_llama()
    plan = initialize_lowrank(model, rank=4, target_modules="all-linear", exclude_modules=["k_proj"])
    assert {n.rpartition(".")[2] for n in plan.ranks} == {
        "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert all(n.startswith("model.layers.1.") for n in plan.ranks)
    plan = initialize_lowrank(tiny_gpt2(), rank=4, rank_pattern={"c_fc": 6})
    assert plan.ranks == {"transformer.h.1.mlp.c_fc": 6, "transformer.h.1.mlp.c_proj": 4}


def test_train_export_and_load_a_small_wide_model(tmp_path, ids):
    model = tiny_wide()
    assert model.model.layers[1].self_attn.o_proj.weight.shape == (48, 32)
    initialize_lowrank(model, rank=8, guide="dense")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for alpha in (1.0, 0.5, 0.0):
        lowrank_ft.set_alpha(model, alpha)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    lowrank_ft.end_guidance(model, optimizer)
    lowrank_ft.save_compact(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [n for n, _ in lowrank_layers(loaded)] == ["model.layers.1.mlp.c_fc", "model.layers.1.mlp.c_proj"]
    assert not any(isinstance(m, GuidedLowRankLinear) for m in loaded.modules())
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_no_checkpoint_is_named_as_origin_of_weights_that_are_new(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DEMO_MODEL))
    assert model.config._name_or_path == str(DEMO_MODEL)
    initialize_lowrank(model, rank=8)
    lowrank_ft.save_compact(model, tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(entry["ranks"]) == 3 * (model.config.num_hidden_layers - 1)
    assert "base_model" not in entry


def test_what_has_full_rank_stays_dense_with_a_warning():
    with pytest.warns(
        UserWarning, match="1 of 3 targeted linears stay dense: model.layers.1.mlp.up_proj: rank 32 is full"
    ):
        plan = initialize_lowrank(tiny_llama(), rank=8, rank_pattern={"up_proj": 32})
    assert len(plan.ranks) == 2
    model = tiny_llama()
    with pytest.raises(RankError, match="every one of the 3 targeted linears stays dense"):
        initialize_lowrank(model, rank=32)
    assert not any(lowrank_layers(model))


def test_refusals():
    with pytest.raises(RankError, match="rank 33 exceeds min"):
        initialize_lowrank(tiny_llama(), rank=33)
    with pytest.raises(RankError, match="give exactly one size"):
        initialize_lowrank(tiny_llama())
    with pytest.raises(ConfigError, match="guide of a model from scratch 'residual' is unknown; choose one of dense"):
        initialize_lowrank(tiny_llama(), rank=8, guide="residual")
    with torch.device("meta"):
        meta = tiny_llama()
    with pytest.raises(ConfigError, match="is on the meta device"):
        initialize_lowrank(meta, rank=8)
    with pytest.raises(TargetError, match="all 3 targeted linears are in the first block"):
        initialize_lowrank(tiny_llama(num_hidden_layers=1), rank=8)
    model = tiny_llama()
    initialize_lowrank(model, rank=8)
    with pytest.raises((PlanError, TargetError)):
        initialize_lowrank(model, rank=8)


def test_feed_forward_linears_of_several_architectures():
    from transformers import BertConfig, BertModel, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with torch.device("meta"):
        bert = BertModel(BertConfig(**small, intermediate_size=48))
        opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32))
        neox = GPTNeoXForCausalLM(GPTNeoXConfig(**small, intermediate_size=48))
        for model in (bert, opt, neox, tiny_llama(), tiny_gpt2()):
            shapes = [set(s.shape) for s in ffn_linears(model)]
            width = 128 if type(model).__name__ == "GPT2LMHeadModel" else 48
            assert shapes
            assert all(shape == {32, width} for shape in shapes), type(model)
    plain = nn.Module()
    plain.layers = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(TargetError, match="does not tell feed-forward linears from attention by name"):
        ffn_linears(plain)
