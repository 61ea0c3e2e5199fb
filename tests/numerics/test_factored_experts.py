"""Factored experts against a loop over tokens and experts in float64: outputs and gradients."""

import copy

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from lowrank_ft.factorization.solvers import Factors, truncated_svd
from lowrank_ft.factorization.targets import find_linears
from lowrank_ft.nn import FactoredExperts, LowRankLinear, UnfoldedExperts, fold_experts, unfold_experts
from lowrank_ft.nn.forms import layer_factors, stored_as, unpivot_layers
from lowrank_ft.nn.replace import dense_weight, factorized, merge

HIDDEN, WIDTH, EXPERTS, RANK = 16, 24, 4, 5


def stock(kind):
    torch.manual_seed(0)
    sizes = dict(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS)
    if kind == "gated":
        experts = MixtralExperts(MixtralConfig(**sizes))
    elif kind == "transposed, with biases":
        experts = GptOssExperts(GptOssConfig(**sizes, num_hidden_layers=1))
    else:
        config = NemotronHConfig(hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS)
        experts = NemotronHExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    experts.config._experts_implementation = "eager"
    return experts.double()


KINDS = ("gated", "transposed, with biases", "without gate")


def holder(experts):
    model = nn.Module()
    model.experts = experts
    return model


def factored(kind, form="factors", leave=()):
    """Experts whose projections, but for those to ``leave``, are truncated factors."""
    model = holder(stock(kind))
    names = [s.name for s in find_linears(model) if s.experts and s.name.rpartition(".")[2] not in leave]
    unfold_experts(model, names)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            found = truncated_svd(dense_weight(module), RANK)
            model.set_submodule(name, factorized(module, Factors(found.U.double(), found.V.double())))
    fold_experts(model)
    with stored_as(model, form):
        experts = model.experts
    return experts


def products(experts):
    """The matrices that the experts stand for: projection to ``(experts, out, in)``."""
    model = holder(copy.deepcopy(experts))
    unfold_experts(model, [s.name for s in find_linears(model)])
    return {
        name: torch.stack([_matrix(layer) for layer in getattr(model.experts, name)]) for name in model.experts.unfolded
    }


def _matrix(layer):
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()
    left, right = layer_factors(layer)
    return left @ right


def reference(experts, weights, x, index, share):
    """One token and one expert after the other."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    rows = []
    for t in range(len(x)):
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for k in range(index.shape[1]):
            e = int(index[t, k])
            h = weights[first][e] @ x[t]
            if experts.has_bias:
                h = h + getattr(experts, f"{first}_bias")[e]
            h = experts.dense_class._apply_gate(experts, h[None])[0] if experts.has_gate else experts.act_fn(h)
            y = weights["down_proj"][e] @ h
            if experts.has_bias:
                y = y + experts.down_proj_bias[e]
            total = total + share[t, k] * y
        rows.append(total)
    return torch.stack(rows)


ROUTES = {
    "all experts": torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0], [0, 2], [3, 1]]),
    "one expert without a token": torch.tensor([[0, 1], [3, 1], [1, 0], [3, 0], [0, 3], [3, 1]]),
    "one expert takes all": torch.tensor([[2, 0], [2, 0], [2, 0], [2, 0], [2, 0], [2, 0]]),
    "a single token": torch.tensor([[3, 1]]),
}


def inputs(route):
    index = ROUTES[route]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(index), HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    share = torch.rand(index.shape, dtype=torch.float64, generator=generator).requires_grad_()
    return x, index, share


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("form", ["factors", "pivoted"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_a_loop(kind, form, route):
    experts = factored(kind, form)
    assert isinstance(experts, FactoredExperts)
    assert {s.pivot is None for s in experts.factors.values()} == {form == "factors"}
    x, index, share = inputs(route)
    expected = reference(experts, products(experts), x, index, share)
    torch.testing.assert_close(experts(x, index, share), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_loop(kind, route):
    experts = factored(kind)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    x, index, share = inputs(route)
    target = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parts = [p for name in (first, "down_proj") for p in (experts.factors[name].U, experts.factors[name].V)]
    trained = [x, share, *parts]
    found = torch.autograd.grad((experts(x, index, share) * target).sum(), trained)
    weights = {name: torch.einsum("eor,eri->eoi", experts.factors[name].U, experts.factors[name].V)
               for name in (first, "down_proj")}  # fmt: skip
    expected = torch.autograd.grad((reference(experts, weights, x, index, share) * target).sum(), trained)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    reached = set(index.flatten().tolist())
    for gradient in found[2:]:
        assert {e for e in range(EXPERTS) if gradient[e].any()} == reached


@pytest.mark.parametrize("kind", KINDS)
def test_unfolded_experts_compute_the_same_and_come_back_as_they_were(kind):
    experts = stock(kind)
    model = holder(experts)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, index, share = inputs("one expert without a token")
    expected = experts(x, index, share)
    unfold_experts(model, [s.name for s in find_linears(model)])
    assert isinstance(model.experts, UnfoldedExperts)
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 2 * EXPERTS
    torch.testing.assert_close(model.experts(x, index, share), expected, rtol=1e-12, atol=1e-12)
    fold_experts(model)
    assert type(model.experts) is type(experts)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_experts_are_stock_ones_that_compute_the_product(kind):
    experts = factored(kind, "pivoted")
    x, index, share = inputs("all experts")
    expected = experts(x, index, share)
    model = merge(holder(copy.deepcopy(experts)))
    assert type(model.experts) is experts.dense_class
    model.experts.config._experts_implementation = "eager"
    torch.testing.assert_close(model.experts.double()(x, index, share), expected, rtol=1e-5, atol=1e-5)


def test_one_projection_alone_may_be_factored():
    experts = factored("gated", leave=("down_proj",))
    assert list(experts.factors) == ["gate_up_proj"]
    x, index, share = inputs("one expert without a token")
    expected = reference(experts, products(experts), x, index, share)
    torch.testing.assert_close(experts(x, index, share), expected, rtol=1e-9, atol=1e-9)
    unfolded = holder(experts)
    unfold_experts(unfolded)
    assert sum(isinstance(m, LowRankLinear) for m in unfolded.modules()) == EXPERTS
    torch.testing.assert_close(unfolded.experts(x, index, share), expected, rtol=1e-9, atol=1e-9)


def test_pivoted_experts_become_plain_ones_that_compute_the_same():
    model = holder(factored("gated", "pivoted"))
    x, index, share = inputs("all experts")
    expected = model.experts(x, index, share)
    assert unpivot_layers(model) == 2
    assert all(s.pivot is None for s in model.experts.factors.values())
    torch.testing.assert_close(model.experts(x, index, share), expected, rtol=1e-9, atol=1e-9)
    stack = model.experts.factors["down_proj"]
    gram = torch.einsum("eor,eos->ers", stack.U, stack.U)
    torch.testing.assert_close(gram, torch.einsum("eri,esi->ers", stack.V, stack.V), rtol=1e-6, atol=1e-6)  # balanced


def test_training_a_pivoted_form_warns():
    experts = factored("gated", "pivoted").eval()
    with pytest.warns(UserWarning, match="pivoted, a form for running"):
        experts.train()
