"""Experts that are stacked in one parameter: planned, counted, fitted, trained."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import lowrank_ft
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.experts import one_by_one, plan_spectra
from lowrank_ft.conversion.record import ConversionRecord
from lowrank_ft.costs.flops import compare, experts_per_token, step_cost, training_cost
from lowrank_ft.errors import ConfigError, PlanError
from lowrank_ft.factorization.allocation import allocate_ranks
from lowrank_ft.factorization.plan import Plan, make_plan
from lowrank_ft.factorization.ranks import factored_parameters, ranks_for_param_ratio
from lowrank_ft.factorization.solvers import Regression, truncated_svd
from lowrank_ft.integrations.peft import LowRankConfig
from lowrank_ft.nn import FactoredExperts, LowRankLinear, UnfoldedExperts, factored_stacks, lowrank_layers, stored_form
from lowrank_ft.nn.forms import stored_as
from lowrank_ft.nn.unfolded import unfold
from lowrank_ft.training.trainable import merge_adapters, restrict_training

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS = 4
FIRST = "model.layers.0.mlp.experts"


def mixtral(**changed):
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_local_experts": EXPERTS, **changed})).eval()


def batches(count=4, rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 97, (rows, 16), generator=generator)} for _ in range(count)]


def settings(data=None, **changed):
    return Calibration(data or batches(), **{"refine_epochs": 0, "distill_epochs": 0.0, **changed})


# --- plan and counts


def test_a_stack_is_planned_and_counted_with_all_its_experts():
    model = mixtral()
    plan = make_plan(model, param_ratio=0.6)
    stacks = {p.name: p for p in plan.linears if p.experts}
    assert [p.shape for p in stacks.values()] == [(96, 32), (32, 48)] * 2
    assert plan.target_parameters == sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert 0.57 < plan.param_ratio <= 0.6
    p = stacks[f"{FIRST}.down_proj"]
    assert p.parameters == EXPERTS * factored_parameters(p.shape, p.rank)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    lowrank_ft.convert(model, plan)
    with stored_as(model, "pivoted"):
        assert lowrank_ft.factorization.plan.count_parameters(model) == plan.converted_model_parameters
        assert sum(s.numbers for _, s in factored_stacks(model)) == sum(p.parameters for p in stacks.values())


def test_a_budget_counts_each_expert():
    shapes = [(64, 64), (64, 64)]
    ranks = ranks_for_param_ratio(shapes, 0.5, copies=[1, 7])
    spent = factored_parameters(shapes[0], ranks[0]) + 7 * factored_parameters(shapes[1], ranks[1])
    assert spent <= 0.5 * 8 * 64 * 64
    squares, budget = torch.logspace(0, -3, 64).numpy(), 64 * 64 // 2
    # Seven times as dear, and worth seven times as much.
    one = allocate_ranks(shapes[:1], [squares], budget, 0.5)
    assert allocate_ranks(shapes[:1], [7 * squares], 7 * budget, 0.5, copies=[7]) == one
    first, second = allocate_ranks(shapes, [squares, squares], 8 * budget, 0.5, copies=[1, 7])
    assert first is None or first > second  # seven times as dear, and worth the same
    assert factored_parameters(shapes[1], second) * 7 + 64 * 64 // 4 < 8 * budget


@pytest.mark.parametrize("change", [{"experts": 3}, {"shape": [96, 31]}])
def test_a_plan_of_other_experts_is_refused(change):
    data = json.loads(json.dumps(make_plan(mixtral(), rank=4).to_dict()))
    entry = next(e for e in data["linears"] if e["experts"])
    entry |= change
    with pytest.raises(PlanError, match=r"is 4 experts of \(96, 32\) in the model and"):
        lowrank_ft.convert(mixtral(), Plan.from_dict(data))


def test_experts_can_be_left_out_and_named():
    plan = make_plan(mixtral(), rank=4, exclude_modules=["gate_up_proj", "down_proj"])
    assert not any(p.experts for p in plan.linears)
    plan = make_plan(mixtral(), rank=4, target_modules=["down_proj"])
    assert [p.name for p in plan.linears] == [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]
    model = mixtral()
    lowrank_ft.convert(model, plan)
    assert list(model.model.layers[0].mlp.experts.factors) == ["down_proj"]
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (EXPERTS, 96, 32)


def test_flops_count_the_experts_that_a_token_meets():
    model = mixtral()
    plan = make_plan(model, rank=8)
    attention = 2 * (32 * 32 * 2 + 16 * 32 * 2) + 97 * 32
    experts = 2 * EXPERTS * 3 * 32 * 48
    assert experts_per_token(model) == 2
    assert compare(model).dense.multiply_adds == attention + experts // 2
    cost = training_cost(model, plan, 1000, 16)
    assert cost.dense.ffn_parameters == experts
    lowrank_ft.convert(model, plan)
    found = compare(model)
    assert found.dense.multiply_adds == attention + experts // 2
    factors = 2 * EXPERTS * 8 * (96 + 32 + 32 + 48)
    assert found.compact.factored - found.compact.factored_multiply_adds == factors // 2
    assert {p.name: p.rank for p in found.linears} == plan.ranks
    guided = mixtral()
    lowrank_ft.convert(guided, plan, guide="residual")
    assert compare(guided).compact == found.compact
    assert step_cost(guided).guide == 2 * (attention - 97 * 32 + experts // 2)


# --- calibration


def test_each_expert_is_fitted_to_the_tokens_that_it_receives():
    """Against the moments that a loop over the router's choices collects."""
    model = mixtral()
    dense, data = copy.deepcopy(model), batches(8)
    received: dict[int, list] = {}

    def note(module, args):
        hidden, index, _ = args
        for e in range(EXPERTS):
            received.setdefault(e, []).append(hidden[(index == e).any(-1)].double())

    handle = dense.model.layers[0].mlp.experts.register_forward_pre_hook(note)
    for batch in data:
        dense(**batch)
    handle.remove()
    calibration = settings(data)
    lowrank_ft.convert(model, rank=6, target_modules=["gate_up_proj"], method="activation", calibration=calibration)
    importance = calibration.importance[model]
    stack = model.model.layers[0].mlp.experts.factors["gate_up_proj"]
    for e, parts in received.items():
        x = torch.cat(parts)
        weight = dense.model.layers[0].mlp.experts.gate_up_proj[e]
        solver = Regression(x.T @ x, None, max(settings().damping, 32 / len(x)))
        expected = solver(weight, 6, importance=importance[f"model.layers.0.mlp.experts.gate_up_proj.{e}"])
        torch.testing.assert_close(stack.U[e] @ stack.V[e], expected.U @ expected.V, rtol=1e-3, atol=1e-5)


def to_three(model):
    """No token goes to expert 3, and few to expert 2."""
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[3] = 0
        layer.mlp.gate.forward = lambda hidden, gate=layer.mlp.gate: _few(gate, hidden)
    return model


def _few(gate, hidden):
    tokens = hidden.reshape(-1, 32).shape[0]
    index = torch.tensor([[0, 1]]).repeat(tokens, 1)
    index[0, 1] = 2
    return torch.zeros(tokens, EXPERTS), torch.full((tokens, 2), 0.5), index


def test_experts_with_few_tokens_or_none_are_factorized_by_their_weight_and_that_is_said():
    model, data = to_three(mixtral()), batches(3)
    dense = copy.deepcopy(model)
    record = ConversionRecord()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lowrank_ft.convert(model, rank=6, method="activation", calibration=settings(data), record=record)
    said = [str(w.message) for w in caught]
    few = [s for s in said if "received 3 calibration tokens or less" in s]
    none = [s for s in said if "no calibration token reached" in s]
    assert len(few) == len(none) == 2
    assert few[0].startswith(f"2 matrices of experts of model.layers.0 (the first is {FIRST}.gate_up_proj.2)")
    assert f"{FIRST}.gate_up_proj.3" in none[0]
    stack, weights = model.model.layers[0].mlp.experts.factors["down_proj"], dense.model.layers[0].mlp.experts.down_proj
    for e in range(EXPERTS):
        plain = truncated_svd(weights[e], 6)
        same = torch.allclose(stack.U[e] @ stack.V[e], plain.U @ plain.V, atol=1e-5)
        assert same == (e in (2, 3))
    assert set(record.linears) == set(make_plan(dense, rank=6).ranks)
    assert record.linears[f"{FIRST}.down_proj"].output_error is not None


def test_a_stack_is_worth_the_sum_of_its_experts():
    model = mixtral()
    plan = make_plan(model, rank=6)
    names = list(stored_form(model)[0])
    found = plan_spectra(model, plan, settings(), "loss")
    assert not names
    assert not any(isinstance(m, UnfoldedExperts) for m in model.modules())
    assert set(found) == set(plan.ranks)
    assert one_by_one(plan).target_parameters == plan.target_parameters
    lone = to_three(mixtral())
    reached = plan_spectra(lone, plan, settings(), "energy")[f"{FIRST}.down_proj"]
    assert reached.sum().item() == pytest.approx(3)  # of four experts, three were reached; each counts as one


@pytest.mark.parametrize("options", [
    {"method": "anchored"}, {"method": "activation", "refine": 1}, {"method": "activation", "distill": 1.0},
])  # fmt: skip
def test_every_way_of_fitting_takes_experts(options):
    model = mixtral()
    dense = copy.deepcopy(model)
    calibration = settings(refine_epochs=options.get("refine", 0), distill_epochs=options.get("distill", 0.0))
    lowrank_ft.convert(model, param_ratio=0.6, method=options["method"], calibration=calibration)
    assert isinstance(model.model.layers[0].mlp.experts, FactoredExperts)
    x = batches(1, seed=9)[0]
    assert torch.isfinite(model(**x).logits).all()
    assert (model(**x).logits - dense(**x).logits).norm() < dense(**x).logits.norm()


# --- training


def step(model):
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    x = batches(1)[0]["input_ids"]
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    model.eval()
    return {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}


def test_stacked_factors_are_trained():
    model = mixtral()
    lowrank_ft.convert(model, rank=6)
    moved = step(model)
    assert {f"{FIRST}.factors.{n}.{f}" for n in ("gate_up_proj", "down_proj") for f in "UV"} <= moved


@pytest.mark.parametrize("guide", ["residual", "dense"])
def test_a_guide_makes_the_dense_model_and_is_dropped(guide):
    model = mixtral()
    x = batches(1)[0]
    dense = model(**x).logits
    lowrank_ft.convert(model, rank=6, guide=guide)
    torch.testing.assert_close(model(**x).logits, dense, rtol=1e-4, atol=1e-5)
    assert sum(1 for n, _ in lowrank_layers(model) if ".experts." in n) == 2 * 2 * EXPERTS
    assert stored_form(model)[0] == make_plan(mixtral(), rank=6).ranks == model.config.quantization_config["ranks"]
    step(model)
    lowrank_ft.end_guidance(model)
    expected = model(**x).logits
    with stored_as(model, "factors"):
        assert isinstance(model.model.layers[0].mlp.experts, FactoredExperts)
        torch.testing.assert_close(model(**x).logits, expected)
    assert isinstance(model.model.layers[0].mlp.experts, UnfoldedExperts)


def test_guides_are_attached_to_a_compact_model():
    dense, model = mixtral(), mixtral()
    lowrank_ft.convert(model, rank=6)
    lowrank_ft.attach_guides(model, dense, "residual")
    x = batches(1)[0]
    torch.testing.assert_close(model(**x).logits, dense(**x).logits, rtol=1e-4, atol=1e-5)
    assert type(dense.model.layers[0].mlp.experts).__name__ == "MixtralExperts"


@pytest.mark.parametrize("trainable", ["factors", "lora", "leading"])
def test_parts_of_the_factors_are_trained(trainable):
    model = mixtral()
    lowrank_ft.convert(model, rank=6)
    x = batches(1)[0]
    before = model(**x).logits
    restrict_training(model, trainable, r=2)
    torch.testing.assert_close(model(**x).logits, before, rtol=1e-4, atol=1e-5)
    moved = step(model)
    assert moved
    assert not any("gate.weight" in n or "norm" in n for n in moved)
    assert any(".experts." in n for n in moved)
    after = model(**x).logits
    assert merge_adapters(model) == (0 if trainable == "factors" else 2 * sum(1 for _ in lowrank_layers(model)))
    torch.testing.assert_close(model(**x).logits, after, rtol=1e-4, atol=1e-5)


def test_frozen_experts_stay_frozen():
    model = mixtral()
    model.model.layers[0].mlp.experts.requires_grad_(False)
    lowrank_ft.convert(model, rank=6)
    assert not any(p.requires_grad for p in model.model.layers[0].mlp.experts.factors.parameters())
    assert all(p.requires_grad for p in model.model.layers[1].mlp.experts.factors.parameters())


# --- forms and neighbours


def test_a_model_can_be_copied_pickled_and_cast(tmp_path):
    model = mixtral()
    lowrank_ft.convert(model, rank=6)
    x = batches(1)[0]
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(**x).logits, model(**x).logits)
    assert copy.deepcopy(model).to(torch.bfloat16)(**x).logits.dtype == torch.bfloat16


def test_unfolded_factors_are_views_of_their_stack():
    model = GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=EXPERTS)).eval()
    lowrank_ft.convert(model, rank=6)
    with stored_as(model, "pivoted"):
        experts = model.model.layers[0].mlp.experts
    linears = unfold(experts)
    for e, layer in enumerate(linears.gate_up_proj):
        assert isinstance(layer, LowRankLinear)
        assert layer.U.weight.data_ptr() == experts.factors["gate_up_proj"].U[e].data_ptr()
        assert layer.V.weight.data_ptr() == experts.factors["gate_up_proj"].V[e].data_ptr()


def test_a_converted_model_is_not_converted_again():
    model = mixtral()
    lowrank_ft.convert(model, rank=6, target_modules=["down_proj"])
    with pytest.raises(PlanError, match="has factored linears already"):
        lowrank_ft.convert(model, rank=6)


def test_an_adapter_leaves_experts_dense():
    model = mixtral()
    plan = make_plan(model, rank=6)
    with pytest.warns(UserWarning, match="4 stacks of experts of the plan"):
        config = LowRankConfig.from_plan(plan)
    assert not any("experts" in name for name in config.target_modules)
    assert not any(p.experts for p in LowRankConfig(r=6).to_plan(model).linears)
    only = make_plan(model, rank=6, target_modules=["down_proj"])
    with pytest.raises(ConfigError, match="leaves every linear dense"):
        LowRankConfig.from_plan(only)


def test_experts_of_another_layout_stay_dense_and_are_said():
    from transformers import DbrxConfig, DbrxForCausalLM

    from lowrank_ft.factorization.remainder import notes

    config = DbrxConfig(
        vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 32, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    )  # fmt: skip
    with torch.device("meta"):
        model: nn.Module = DbrxForCausalLM(config)
    (said,) = [n for n in notes(model, make_plan(model, rank=4)) if n.startswith("experts")]
    assert "experts of 2 layers stay dense" in said
    assert "stacked in a layout of their own" in said
