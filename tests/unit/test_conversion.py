import pytest
import torch
from peft import get_peft_model
from torch import nn

from lowrank_ft import LowRankConfig
from lowrank_ft.checkpoints.format import describe_in_config
from lowrank_ft.conversion.convert import convert
from lowrank_ft.conversion.guides import attach_guides
from lowrank_ft.errors import ConfigError, NonFiniteError, PlanError, TargetError
from lowrank_ft.factorization.plan import LinearPlan, Plan, make_plan
from lowrank_ft.nn import GUIDES, LowRankLinear, end_guidance, lowrank_layers
from lowrank_ft.nn.replace import merge
from tests.conftest import tiny_gpt2, tiny_llama

MODELS = [tiny_llama, tiny_gpt2]


@pytest.mark.parametrize("make", MODELS)
def test_full_rank_changes_nothing(make, ids):
    model, reference = make(), make()(ids).logits
    plan = make_plan(model, rank=1.0, keep_full_rank=True)
    convert(model, plan)
    assert len(list(lowrank_layers(model))) == len(plan.linears)
    torch.testing.assert_close(model(ids).logits, reference, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("make", MODELS)
def test_each_factored_linear_is_its_best_approximation(make, ids):
    model, dense = make(), make()
    plan = convert(model, rank=6)
    for name, layer in lowrank_layers(model):
        module = dense.get_submodule(name)
        weight = (module.weight.T if layer.transposed else module.weight).double()
        product = layer.U.weight.double() @ layer.V.weight.double()
        tail = torch.linalg.svdvals(weight)[plan.ranks[name] :].square().sum()
        torch.testing.assert_close((weight - product).square().sum(), tail, rtol=1e-4, atol=1e-8)
        assert layer.bias is None or torch.equal(layer.bias, module.bias)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("guide", GUIDES)
def test_a_guided_model_starts_as_the_dense_one_and_ends_as_the_compact_one(make, guide, ids):
    guided, compact, reference = make(), make(), make()(ids).logits
    plan = convert(guided, rank=6, guide=guide)
    convert(compact, plan)
    torch.testing.assert_close(guided(ids).logits, reference, atol=2e-5, rtol=1e-4)
    end_guidance(guided)
    assert torch.equal(guided(ids).logits, compact(ids).logits)


@pytest.mark.parametrize("make", MODELS)
def test_merge_gives_the_stock_classes_back(make, ids):
    model, stock = make(), make()
    convert(model, rank=6)
    expected = model(ids).logits
    merge(model)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in stock.named_modules()}
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
    assert getattr(model.config, "quantization_config", None) is None
    torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=1e-4)


def test_attach_guides_finds_the_dense_weights_with_or_without_prefix(ids):
    dense = tiny_llama()
    expected = dense(ids).logits
    compact = tiny_llama()
    convert(compact, rank=6)
    attach_guides(compact, dense, "residual")
    torch.testing.assert_close(compact(ids).logits, expected, atol=2e-5, rtol=1e-4)

    body = tiny_llama()
    convert(body, rank=6)
    attach_guides(body, dense.model, "residual")
    torch.testing.assert_close(body(ids).logits, expected, atol=2e-5, rtol=1e-4)


def test_a_guide_of_another_model_is_refused():
    model = tiny_llama()
    convert(model, rank=6)
    with pytest.raises(PlanError, match=r"mlp\.gate_proj is \(48, 32\), but \(56, 32\) in the guide model"):
        attach_guides(model, tiny_llama(intermediate_size=56), "residual")
    with pytest.raises(PlanError, match="no dense linear"):
        attach_guides(model, tiny_gpt2(), "residual")


def test_a_guide_with_other_weights_is_refused():
    model = tiny_llama(seed=0)
    convert(model, rank=8)
    with pytest.raises(PlanError, match="is not the one that the checkpoint was made from"):
        attach_guides(model, tiny_llama(seed=1), "residual")


def test_factors_that_were_fitted_to_outputs_keep_their_guide(ids):
    """They may be farther from their weight than zero is; then, too, the guide makes up for all of it."""
    dense, model = tiny_llama(), tiny_llama()
    convert(model, rank=8)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    weight = dense.get_submodule("model.layers.0.mlp.up_proj").weight
    for _, each in lowrank_layers(model):
        each.U.weight.data *= 3
    assert (weight - layer.U.weight @ layer.V.weight).norm() > weight.norm()
    attach_guides(model, dense, "residual")
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=2e-5, rtol=1e-4)


def test_a_compact_model_is_not_converted_again():
    model = tiny_llama()
    convert(model, rank=8)
    with pytest.raises(PlanError, match="has factored linears already"):
        convert(model, rank=4)
    with pytest.raises(TargetError, match="compact already"):
        get_peft_model(model, LowRankConfig(r=4))


def test_a_plan_may_not_name_a_tied_head():
    model = tiny_llama(tie_word_embeddings=True)
    plan = Plan((LinearPlan("lm_head", (97, 32), 4),), 1)
    with pytest.raises(TargetError, match="shares its weight"):
        convert(model, plan)


def test_the_origin_is_kept_through_a_second_save():
    model = tiny_llama()
    model.config._name_or_path, model.config._commit_hash = "me/dense", "f" * 40
    convert(model, rank=8)
    model.config._name_or_path, model.config._commit_hash = "me/compact", "0" * 40
    describe_in_config(model, "me/dense")
    entry = model.config.quantization_config
    assert (entry["base_model"], entry["base_revision"]) == ("me/dense", "f" * 40)
    describe_in_config(model, "me/other")
    assert "base_revision" not in model.config.quantization_config


def test_dtype_device_and_untouched_parameters_are_kept():
    model = tiny_llama().to(torch.bfloat16).train()
    embedding = model.model.embed_tokens.weight
    convert(model, rank=6)
    assert model.model.embed_tokens.weight is embedding
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, LowRankLinear)
    assert (layer.U.weight.dtype, layer.weight.dtype, layer.training) == (torch.bfloat16, torch.bfloat16, True)


def test_the_children_are_plain_linears_with_harmless_names():
    model = tiny_llama()
    convert(model, rank=6)
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer.U) is nn.Linear
    assert type(layer.V) is nn.Linear
    assert layer.U.bias is None
    assert {n for n, _ in layer.named_children()} == {"U", "V"}


def test_bad_input():
    model = tiny_llama()
    with pytest.raises(ConfigError, match="method 'magic' is unknown; choose one of svd"):
        convert(model, rank=4, method="magic")
    with pytest.raises(PlanError, match="not both"):
        convert(model, make_plan(model, rank=4), rank=4)
    with pytest.raises(PlanError, match=r"the plan names transformer\.h\.0"):
        convert(model, make_plan(tiny_gpt2(), rank=4))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        convert(model, rank=4)
